"""The prefix index against a list of all that was put into it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from statewise.memory import index as module
from statewise.memory.index import PrefixIndex

TOKENS = st.lists(st.integers(0, 2), max_size=9)  # few tokens and short pages: prefixes meet often


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@given(
    page_size=st.integers(1, 4),
    entries=st.lists(st.tuples(st.sampled_from("ab"), TOKENS), max_size=12),
    gone=st.sets(st.integers(0, 11), max_size=6),
    asked=st.tuples(st.sampled_from("abc"), TOKENS),
)
def test_it_finds_the_deepest_point_and_the_longest_common_run(
    page_size: int, entries: list[tuple[str, list[int]]], gone: set[int], asked: tuple[str, list[int]]
) -> None:
    index: PrefixIndex[int] = PrefixIndex(page_size)
    live, points = {}, {}
    for number, (tenant, tokens) in enumerate(entries):
        if index.find(tenant, tokens) is None:
            points[number] = index.add(tenant, tokens, number)
            live[number] = (tenant, tokens)
    for number in gone & points.keys():
        index.remove(points.pop(number))
        del live[number]
    tenant, tokens = asked
    found = index.match(tenant, tokens)
    own = [entry for owner, entry in live.values() if owner == tenant]
    begun = [entry for entry in own if tokens[: len(entry)] == entry]
    if begun:
        assert found.point is not None
        assert found.point.num_tokens == max(map(len, begun))
        assert live[found.point.value] == (tenant, tokens[: found.point.num_tokens])
    else:
        assert found.point is None
    assert found.common >= max((shared(tokens, entry) for entry in own), default=0)
    everything = [entry for owner, entry in entries if owner == tenant]
    assert found.common <= max((shared(tokens, entry) for entry in everything), default=0)
    assert [point.num_tokens for point in index.along(tenant, tokens)] == sorted(map(len, begun))
    assert sorted(point.value for point in index.points()) == sorted(live)
    for number, point in points.items():
        owner, entry = live[number]
        before = [len(e) for o, e in live.values() if o == owner and len(e) < len(entry) and entry[: len(e)] == e]
        found_before = index.before(point)
        assert (found_before.num_tokens if found_before else 0) == max(before, default=0)
        assert b"".join(node.page for node in point.path()) + point.tail == array("i", entry).tobytes()


def test_what_was_evicted_is_told_from_what_never_was() -> None:
    index: PrefixIndex[str] = PrefixIndex(4)
    point = index.add("", range(10), "x")
    assert not index.match("", [*range(8), 99]).evicted
    index.remove(point)
    found = index.match("", range(10))
    assert (found.point, found.evicted) == (None, True)
    assert found.common == 8
    assert index.match("", [5]).common == 0


def test_the_memory_of_what_is_gone_is_bounded(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(module, "MAX_GHOSTS", 20)
    index: PrefixIndex[int] = PrefixIndex(2)
    for number in range(500):
        index.remove(index.add("", [number, number, 1, number, 7], number))
    nodes = [index._roots[""]]
    for node in nodes:
        nodes += node.children.values()
    assert len(nodes) < 60
