"""The prefix index: which prompts begin with tokens whose memory is frozen somewhere."""

from __future__ import annotations

from array import array
from bisect import bisect, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeAlias, TypeVar

Value = TypeVar("Value")
Tokens: TypeAlias = Sequence[int] | bytes
"""Token ids, or what `encoded` made of them."""
TOKEN_BYTES = 4
MAX_GHOSTS = 4096  # pages of tokens remembered without a checkpoint, to tell what was lost from what never was


@dataclass(eq=False)
class Node:
    """One full page of tokens behind its parent's. `points` end within the next page, at any token."""

    parent: Node | None
    page: bytes  # its tokens, int32; empty for a root
    depth: int  # pages from the root
    children: dict[bytes, Node] = field(default_factory=dict)
    points: dict[bytes, Point[Any]] = field(default_factory=dict)  # by their tails
    ahead: list[bytes] = field(default_factory=list)  # the pages of all children and all tails, sorted
    evicted: bool = False  # a checkpoint was here
    tenant: str = ""  # of a root


@dataclass(eq=False)
class Point(Generic[Value]):
    """A frozen token count: `node` holds its full pages, `tail` the tokens behind them (fewer than a page)."""

    node: Node
    tail: bytes
    num_tokens: int
    value: Value

    def path(self) -> list[Node]:
        """The nodes of its full pages, first to last."""
        nodes, node = [], self.node
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]

    @property
    def tenant(self) -> str:
        node = self.node
        while node.parent is not None:
            node = node.parent
        return node.tenant

    @property
    def tokens(self) -> list[int]:
        """All tokens before it."""
        return array("i", b"".join(node.page for node in self.path()) + self.tail).tolist()


@dataclass(frozen=True)
class Match(Generic[Value]):
    """What the index knows about a prompt."""

    point: Point[Value] | None  # the deepest frozen point that the prompt begins with
    common: int  # tokens that the prompt shares with any prompt the index remembers
    evicted: bool  # beyond `point`, on the prompt's own path, there was a checkpoint that is gone


class PrefixIndex(Generic[Value]):
    """Points by the tokens before them. A tenant sees its own only.

    Tokens are compared, not digests, so no collision can hand one prompt the memory of another.
    """

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self._roots: dict[str, Node] = {}
        self._ghosts: dict[Node, None] = {}  # leaves without points, oldest first

    def add(self, tenant: str, tokens: Tokens, value: Value) -> Point[Value]:
        """Register `value` behind exactly `tokens`. The caller has checked that nothing is there (`find`)."""
        raw = encoded(tokens)
        node = self._roots.setdefault(tenant, Node(None, b"", 0, tenant=tenant))
        step = self.page_size * TOKEN_BYTES
        for at in range(0, len(raw) // step * step, step):
            page = raw[at : at + step]
            child = node.children.get(page)
            if child is None:
                child = node.children[page] = Node(node, page, node.depth + 1)
                insort(node.ahead, page)
            self._ghosts.pop(child, None)
            node = child
        point = Point(node, raw[node.depth * step :], len(raw) // TOKEN_BYTES, value)
        node.points[point.tail] = point
        insort(node.ahead, point.tail)
        node.evicted = False
        return point

    def find(self, tenant: str, tokens: Tokens) -> Point[Value] | None:
        """The point behind exactly `tokens`."""
        raw, step = encoded(tokens), self.page_size * TOKEN_BYTES
        node, end = self._roots.get(tenant), len(raw) // step * step
        for at in range(0, end, step):
            node = node.children.get(raw[at : at + step]) if node is not None else None
        return node.points.get(raw[end:]) if node is not None else None

    def match(self, tenant: str, tokens: Tokens) -> Match[Value]:
        """The deepest point that `tokens` begins with, at any token position."""
        root = self._roots.get(tenant)
        if root is None:
            return Match(None, 0, False)
        raw, step = encoded(tokens), self.page_size * TOKEN_BYTES
        path = [root]
        while (child := path[-1].children.get(raw[path[-1].depth * step : path[-1].depth * step + step])) is not None:
            path.append(child)
        last = path[-1]
        rest = raw[last.depth * step : last.depth * step + step]
        place = bisect(last.ahead, rest)
        # In sorted order, what has the most in common with `rest` is right before or behind it.
        near = last.ahead[max(place - 1, 0) : place + 1]
        common = last.depth * self.page_size + max((_shared(rest, other) for other in near), default=0)
        evicted = False
        for node in reversed(path):
            fitting = _fitting(node, raw[node.depth * step : node.depth * step + step])
            if fitting:
                return Match(fitting[-1], common, evicted)
            evicted |= node.evicted
        return Match(None, common, evicted)

    def along(self, tenant: str, tokens: Tokens) -> list[Point[Value]]:
        """All points that `tokens` begins with, by rising token count."""
        found: list[Point[Value]] = []
        raw, step = encoded(tokens), self.page_size * TOKEN_BYTES
        node = self._roots.get(tenant)
        while node is not None:
            rest = raw[node.depth * step : node.depth * step + step]
            found += _fitting(node, rest)
            node = node.children.get(rest)
        return found

    def remove(self, point: Point[Value]) -> None:
        """Forget a point. Its tokens are remembered for a while, so that a miss can be explained."""
        node = point.node
        del node.points[point.tail]
        node.ahead.remove(point.tail)
        node.evicted = True
        self._haunt(node)

    def before(self, point: Point[Value]) -> Point[Value] | None:
        """The deepest other point on the way to `point`: what is between must be computed again if `point` is lost."""
        following, node = point.tail, point.node
        while True:
            earlier = [other for other in _fitting(node, following) if other is not point]
            if earlier:
                return earlier[-1]
            if node.parent is None:
                return None
            following, node = node.page, node.parent

    def known_to_others(self, tenant: str, tokens: Tokens) -> bool:
        """Whether another tenant's tokens begin with the first full page of these."""
        page = encoded(tokens[: self.page_size])
        full = len(page) == self.page_size * TOKEN_BYTES
        return full and any(page in root.children for other, root in self._roots.items() if other != tenant)

    def points(self) -> Iterator[Point[Value]]:
        """All points, in no particular order."""
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            yield from node.points.values()
            stack += node.children.values()

    def clear(self, tenant: str | None = None) -> None:
        """Forget the tokens of all tenants, or of one. The caller has removed their points."""
        gone = [self._roots.pop(name) for name in list(self._roots) if tenant in (None, name)]
        for node in gone:
            gone.extend(node.children.values())
            self._ghosts.pop(node, None)

    def _haunt(self, node: Node) -> None:
        """Keep a bounded number of leaves that hold nothing any more."""
        if not node.points and not node.children and node.parent is not None:
            self._ghosts[node] = None
        while len(self._ghosts) > MAX_GHOSTS:
            oldest = next(iter(self._ghosts))
            del self._ghosts[oldest]
            parent = oldest.parent
            assert parent is not None
            del parent.children[oldest.page]
            parent.ahead.remove(oldest.page)
            if not parent.points and not parent.children and parent.parent is not None:
                self._ghosts[parent] = None


def _fitting(node: Node, rest: bytes) -> list[Point[Any]]:
    """The points of a node whose tails `rest`, less than a page or a page, begins with, by rising token count."""
    tails = (rest[:end] for end in range(0, len(rest) + 1, TOKEN_BYTES))
    return [node.points[tail] for tail in tails if tail in node.points] if node.points else []


def encoded(tokens: Tokens) -> bytes:
    """Tokens as the index takes them, for a caller that asks often: int32, one behind the other."""
    return tokens if isinstance(tokens, bytes) else array("i", tokens).tobytes()


def _shared(one: bytes, other: bytes) -> int:
    """Tokens that two runs of tokens have in common from the start."""
    length = min(len(one), len(other)) // TOKEN_BYTES
    for i in range(length):
        at = i * TOKEN_BYTES
        if one[at : at + TOKEN_BYTES] != other[at : at + TOKEN_BYTES]:
            return i
    return length
