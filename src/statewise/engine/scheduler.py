"""Which sequences run in the next step, and how many tokens of each."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass

from torch import Tensor

from statewise.config import EngineConfig
from statewise.engine.request import Request, Sequence
from statewise.memory.blocks import BlockPool
from statewise.memory.cache import CheckpointCache
from statewise.memory.index import TOKEN_BYTES, Match, encoded
from statewise.memory.tiers import OWNER, Frozen
from statewise.ops.batch import CHUNK

FREE_SHARE = 4  # a piece fills one in so many of the records that are free for states on its way
WAY_SHARE = 8  # one in so many of all records may hold such states even if others must go for it
FAR = 4096  # tokens of a long prompt behind which a state is left in any case
PATIENCE = 256  # states left on the way for nobody, until they are left
SPARSE = 8  # times as far apart


@dataclass(frozen=True)
class Work:
    """The next `count` pending tokens of a sequence; none, if all its memory was found frozen."""

    sequence: Sequence
    count: int
    freezes: tuple[tuple[int, int], ...] = ()  # (position, record): states on the way, each into a record of its own


class Scheduler:
    """Running decodes first, then prefill pieces under a token budget, first come first served.

    It owns the blocks: a sequence has a record and pages exactly while it is in `running`. When pages run out, the
    youngest running sequence becomes a checkpoint in host memory and goes on from it later.
    """

    def __init__(self, config: EngineConfig, cache: CheckpointCache, interior_states: bool = False) -> None:
        self.config = config
        self.cache = cache
        self.interior_states = interior_states  # every layer can leave states on the way
        self.records: BlockPool = cache.device.records
        self.pages: BlockPool = cache.device.pages
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.leaving: set[int] = set()  # records that this step's pieces leave states in
        self.suspects: deque[Sequence] = deque()  # were in a batch that failed; each must first run alone

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self) -> list[Work]:
        """The work of the next step; empty when nothing can run. Blocks for it are allocated."""
        self.drop_freezes()  # of a step that an interrupt kept from running
        self.cache.settle()
        if self.suspects:
            return self._next_suspect()
        decodes = []
        for sequence in list(self.running):
            if sequence.pending == 1 and sequence.record is not None and self._grow(sequence):
                decodes.append(Work(sequence, 1))
        decodes = [work for work in decodes if work.sequence.record is not None]  # a later one may have displaced it
        prefills: list[Work] = []
        budget = self.config.max_prefill_tokens
        for sequence in self.running:
            if sequence.pending > 1:
                budget -= self._add_piece(sequence, budget, prefills)
        while self.waiting and len(self.running) < self.config.max_running:
            sequence = self.waiting[0]
            if not self._admit(sequence, budget):
                break
            self.waiting.popleft()
            budget -= self._add_piece(sequence, budget, prefills)
        return decodes + prefills

    def _add_piece(self, sequence: Sequence, budget: int, prefills: list[Work]) -> int:
        count = self._piece(sequence, sequence.computed, budget)
        if count or not sequence.pending:
            prefills.append(Work(sequence, count, self._freezes(sequence, count)))
        return count

    def _freezes(self, sequence: Sequence, count: int) -> tuple[tuple[int, int], ...]:
        """Points on the grid within a piece at which it leaves its state, as close as the records for it allow."""
        start, step = sequence.computed, CHUNK if self.cache.passed < PATIENCE else CHUNK * SPARSE
        positions = range(start - start % step + step, start + count, step)
        if not self.interior_states or not self.cache.enabled or not positions:
            return ()
        most = max(self.cache.room_on_the_way(), self.config.num_records // WAY_SHARE) // FREE_SHARE
        chosen = {position for position in positions if position % FAR == 0}
        if most:
            chosen.update(positions[:: -(-len(positions) // most)])
        freezes = []
        for position in sorted(chosen):
            if self.cache.make_room(1, 0):
                freezes.append((position, self.records.allocate(OWNER, zeroed=False)))
        self.leaving.update(record for _, record in freezes)
        return tuple(freezes)

    def _piece(self, sequence: Sequence, done: int, budget: int) -> int:
        """How many tokens behind `done` come next: all, or as many as the budget allows up to a multiple of the chunk
        length, and none beyond a point that is to be frozen.

        A piece that ends on that grid leaves the same state in a chunked operator however the prompt was cut. Where
        the rest of a budget does not reach the grid the sequence waits for the next step, unless no budget ever would.
        """
        last = next((position for position in sequence.freeze_at if position > done), len(sequence.tokens))
        end = min(last, done + budget)
        if end < last and end < len(sequence.tokens):
            if end - end % CHUNK > done:
                end -= end % CHUNK
            elif self.config.max_prefill_tokens >= CHUNK:
                end = done
        return end - done

    def pages_for(self, tokens: int) -> int:
        """Pages that hold so many tokens; none if no layer keeps any."""
        return -(-tokens // self.config.page_size) if self.pages.spec.nbytes else 0

    def _admit(self, sequence: Sequence, budget: int) -> bool:
        """Give a waiting sequence a record and pages for all its tokens, and what is frozen of its memory."""
        frozen = self._reusable(sequence)
        if frozen is not None and not self.cache.ready(frozen):
            if self.cache.fetch(frozen):
                return False  # on its way from the disk
            frozen = self.cache.ready_before(frozen)
        start = frozen.num_tokens if frozen else 0
        if start < len(sequence.tokens) and not self._piece(sequence, start, budget):
            return False
        needed = self.pages_for(len(sequence.tokens))
        here = self.cache.pages_here(frozen) if frozen else 0
        if not self.cache.make_room(1, needed - here, spare=frozen):
            if frozen is None or not self.cache.make_room(1, needed):
                return False
            frozen = frozen if self.cache.ready(frozen) else None  # its blocks may have been needed
        record = self.records.allocate(sequence.owner, zeroed=frozen is None)
        pages = self.cache.resume(frozen, sequence.owner, record) if frozen else []
        if pages is None:  # it was damaged: from the beginning
            self.records.release(record)
            return self._admit(sequence, budget)
        if frozen is not None:
            sequence.computed, sequence.hidden = frozen.num_tokens, frozen.hidden
            if sequence.index == 0 and not sequence.preempted:
                sequence.request.metrics.cached_tokens = frozen.num_tokens
        sequence.record = record
        sequence.pages = pages + [self.pages.allocate(sequence.owner) for _ in range(needed - len(pages))]
        self._let_go(sequence)
        self.running.append(sequence)
        return True

    def _reusable(self, sequence: Sequence) -> Frozen | None:
        """What a sequence that was preempted has left, or the deepest checkpoint of a new one's prompt, and why it is
        not deeper."""
        request, metrics = sequence.request, sequence.request.metrics
        if sequence.frozen is not None and self.cache.alive(sequence.frozen):
            return sequence.frozen
        sequence.computed = 0  # what a preempted sequence had left may be lost
        if sequence in self.suspects:
            return None
        first = sequence.index == 0 and not sequence.preempted
        if not self.cache.enabled or (request.wants_prompt_rows and sequence.index == 0 and not sequence.generated):
            if first:
                metrics.cache_miss_reason = (
                    "the request wants every row of its prompt" if self.cache.enabled else "disabled"
                )
            return None
        found = self.cache.match(request.tenant, sequence.tokens)
        start = found.point.num_tokens if found.point else 0
        parts = [found.common] if start + CHUNK <= found.common < len(sequence.tokens) else []
        if parts:
            self.cache.passed = 0  # a state on the way would have been of use
        sequence.freeze_at = sorted({*parts, *sequence.params.cache_breakpoints})
        if first:
            metrics.cache_miss_reason = self._why(start, found, request)
        return found.point.value if found.point else None

    def _why(self, start: int, found: Match[Frozen], request: Request) -> str | None:
        """Why no more than `start` tokens are reused; None if no more were ever seen."""
        if start < found.common:
            return "evicted" if found.evicted else "never checkpointed"
        if start:
            return None
        other = self.cache.index.known_to_others(request.tenant, request.prompt_token_ids)
        return "other tenant" if other else "no common prefix"

    def _grow(self, sequence: Sequence) -> bool:
        """Add the page for the next token where one is needed, at the cost of the youngest. False: it was itself."""
        while len(sequence.pages) < self.pages_for(len(sequence.tokens)):
            if self.cache.make_room(0, 1):
                sequence.pages.append(self.pages.allocate(sequence.owner))
                continue
            victim = self.running[-1]
            self.preempt(victim)
            if victim is sequence:
                return False
        return True

    def preempt(self, sequence: Sequence) -> None:
        """Turn a running sequence into a checkpoint in host memory and put it at the head of the queue."""
        assert sequence.record is not None
        if sequence.computed and sequence.hidden is not None and bool(sequence.hidden.isfinite().all()):
            tokens, covered = sequence.tokens[: sequence.computed], sequence.pages[: self.pages_for(sequence.computed)]
            tenant = sequence.request.tenant
            sequence.frozen = self.cache.hold(tenant, tokens, sequence.record, covered, sequence.hidden.clone())
        sequence.preempted = True
        sequence.request.metrics.preemptions += 1
        self._release(sequence)
        self.waiting.appendleft(sequence)
        if sequence.frozen is not None:
            self.cache.evict(sequence.frozen)

    def _let_go(self, sequence: Sequence) -> None:
        if sequence.frozen is not None:
            self.cache.let_go(sequence.frozen)
            sequence.frozen = None

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended, wherever it is, and free its blocks."""
        self._let_go(sequence)
        if sequence.record is not None:
            self._release(sequence)
        for queue in (self.waiting, self.suspects):
            if sequence in queue:
                queue.remove(sequence)

    def _release(self, sequence: Sequence) -> None:
        assert sequence.record is not None
        self.records.release(sequence.record)
        for page in sequence.pages:
            self.pages.release(page)
        sequence.record, sequence.pages = None, []
        self.running.remove(sequence)

    def freeze(self, sequence: Sequence, *, ends: bool = False) -> None:
        """Keep the sequence's memory as it is: a copy of its record, or the record itself if the sequence `ends`."""
        if sequence.record is None or sequence.hidden is None or not bool(sequence.hidden.isfinite().all()):
            return
        tokens, pages = sequence.tokens[: sequence.computed], sequence.pages[: self.pages_for(sequence.computed)]
        keep = self.cache.adopt if ends else self.cache.freeze
        keep(sequence.request.tenant, tokens, sequence.record, pages, sequence.hidden.clone())

    def freeze_on_the_way(self, work: Work, rows: Tensor) -> None:
        """Keep the states that a piece has left; `rows` [count, hidden] are its hidden rows. Call before it counts."""
        if not work.freezes:
            return
        sequence, tokens = work.sequence, encoded(work.sequence.tokens)
        ends = [position - 1 - sequence.computed for position, _ in work.freezes]
        finite = rows[ends].isfinite().all(dim=1).tolist()
        for (position, record), end, sound in zip(work.freezes, ends, finite, strict=True):
            if sound:
                begun, pages = tokens[: position * TOKEN_BYTES], sequence.pages[: self.pages_for(position)]
                self.cache.adopt(sequence.request.tenant, begun, record, pages, rows[end].clone(), passing=True)
            self.records.release(record)  # the cache holds it now, or nobody does
            self.leaving.discard(record)

    def drop_freezes(self) -> None:
        """After a failed step: what its pieces were to leave on the way is not kept."""
        while self.leaving:
            self.records.release(self.leaving.pop())

    def isolate(self, sequences: list[Sequence]) -> None:
        """After a failed step: drop the memory of `sequences`, which may be half written, and rerun each alone."""
        for sequence in sequences:
            if sequence.record is None:  # it has ended
                continue
            self._release(sequence)
            sequence.computed = 0
            if sequence not in self.suspects:
                self.suspects.append(sequence)

    def cleared(self, sequence: Sequence) -> None:
        """A suspect has caught up without failing: it runs with the others again."""
        if sequence in self.suspects:
            self.suspects.remove(sequence)

    def _next_suspect(self) -> list[Work]:
        sequence = self.suspects[0]
        budget = self.config.max_prefill_tokens
        while sequence.record is None and not self._admit(sequence, budget):
            other = next((other for other in reversed(self.running) if other is not sequence), None)
            if other is None:  # what is on its way to host memory holds the blocks
                self.cache.settle(wait=True)
            else:
                self.preempt(other)
        return [Work(sequence, self._piece(sequence, sequence.computed, budget))]

    def check_integrity(self) -> None:
        """Raise `BlockError` unless the pools hold exactly the blocks of running sequences and checkpoints."""
        records = Counter(sequence.record for sequence in self.running if sequence.record is not None)
        self.cache.check_integrity(records, Counter(page for sequence in self.running for page in sequence.pages))
