"""Which sequences run in the next step, and how many tokens of each."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from statewise.config import EngineConfig
from statewise.engine.request import Sequence
from statewise.memory import checkpoint
from statewise.memory.blocks import BlockPool
from statewise.ops.batch import CHUNK


@dataclass(frozen=True)
class Work:
    """The next `count` pending tokens of a sequence."""

    sequence: Sequence
    count: int


class Scheduler:
    """Running decodes first, then prefill pieces under a token budget, first come first served.

    It owns the blocks: a sequence has a record and pages exactly while it is in `running`. When pages run out, the
    youngest running sequence is frozen into a checkpoint in host memory and continues from it later.
    """

    def __init__(self, config: EngineConfig, records: BlockPool, pages: BlockPool) -> None:
        self.config = config
        self.records = records
        self.pages = pages
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.suspects: deque[Sequence] = deque()  # were in a batch that failed; each must first run alone

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self) -> list[Work]:
        """The work of the next step; empty when nothing can run. Blocks for it are allocated."""
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
            if not self._piece(sequence, budget) or not self._admit(sequence):
                break
            self.waiting.popleft()
            budget -= self._add_piece(sequence, budget, prefills)
        return decodes + prefills

    def _add_piece(self, sequence: Sequence, budget: int, prefills: list[Work]) -> int:
        count = self._piece(sequence, budget)
        if count:
            prefills.append(Work(sequence, count))
        return count

    def _piece(self, sequence: Sequence, budget: int) -> int:
        """How many pending tokens come next: all, or as many as the budget allows up to a multiple of the chunk length.

        A piece that ends on that grid leaves the same state in a chunked operator however the prompt was cut. Where
        the rest of a budget does not reach the grid the sequence waits for the next step, unless no budget ever would.
        """
        done = sequence.checkpoint.num_tokens if sequence.checkpoint else sequence.computed
        end = min(len(sequence.tokens), done + budget)
        if end < len(sequence.tokens):
            if end - end % CHUNK > done:
                end -= end % CHUNK
            elif self.config.max_prefill_tokens >= CHUNK:
                end = done
        return end - done

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.config.page_size) if self.pages.spec.nbytes else 0

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence a record and pages for all its tokens, and its memory back if it was preempted."""
        needed = self._pages_for(len(sequence.tokens))
        if self.records.num_free < 1 or self.pages.num_free < needed:
            return False
        sequence.record = self.records.allocate(sequence.owner)
        sequence.pages = [self.pages.allocate(sequence.owner) for _ in range(needed)]
        if sequence.checkpoint is not None:
            checkpoint.restore(sequence.checkpoint, self.records, sequence.record, self.pages, sequence.pages)
            sequence.computed, sequence.checkpoint = sequence.checkpoint.num_tokens, None
        self.running.append(sequence)
        return True

    def _grow(self, sequence: Sequence) -> bool:
        """Add the page for the next token where one is needed, at the cost of the youngest. False: it was itself."""
        while len(sequence.pages) < self._pages_for(len(sequence.tokens)):
            if self.pages.num_free:
                sequence.pages.append(self.pages.allocate(sequence.owner))
                continue
            victim = self.running[-1]
            self.preempt(victim)
            if victim is sequence:
                return False
        return True

    def preempt(self, sequence: Sequence) -> None:
        """Freeze a running sequence into a checkpoint in host memory and put it at the head of the queue."""
        assert sequence.record is not None
        covered = sequence.pages[: self._pages_for(sequence.computed)]
        sequence.checkpoint = checkpoint.take(sequence.computed, self.records, sequence.record, self.pages, covered)
        sequence.request.metrics.preemptions += 1
        self._release(sequence)
        self.waiting.appendleft(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended, wherever it is, and free its blocks."""
        sequence.checkpoint = None
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
        while sequence.record is None and not self._admit(sequence):
            self.preempt(next(other for other in reversed(self.running) if other is not sequence))
        return [Work(sequence, self._piece(sequence, self.config.max_prefill_tokens))]

    def check_integrity(self) -> None:
        """Raise `BlockError` unless the pools hold exactly the blocks of the running sequences."""
        self.records.check_integrity({s.record: 1 for s in self.running if s.record is not None})
        self.pages.check_integrity({page: 1 for s in self.running for page in s.pages})
