"""The layout of one forward pass: which rows belong to which sequence, and where their memory lies."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

CHUNK = 64
"""Tokens per chunk of the chunked operators, counted from the start of a sequence."""


@dataclass(frozen=True)
class Piece:
    """A run of consecutive tokens of one sequence that one step processes."""

    tokens: Sequence[int]
    start: int  # tokens of the sequence that earlier steps have processed
    record: int  # block of the sequence in the record pool
    pages: Sequence[int] = ()  # blocks in the page pool that cover start + len(tokens) tokens
    freezes: Sequence[tuple[int, int]] = ()  # (position, block): the record behind `position` tokens, copied to a block


@dataclass(frozen=True)
class Chunks:
    """The prefill rows of a batch cut into chunks of at most `CHUNK` rows.

    A chunk never crosses a multiple of `CHUNK` counted from the start of its sequence, so the cut does not
    depend on where pieces begin. Chunks are ordered by their ordinal within the sequence; sequences by falling
    number of chunks. The sequences that have a chunk of ordinal c are therefore the first `active[c]` ones.
    """

    rows: Tensor  # [chunks, CHUNK] int64 row of the batch; T (one past the last row) where there is none
    sequences: Tensor  # [prefills] int64 index into the batch, by falling number of chunks
    active: list[int]  # per ordinal: how many sequences have a chunk of that ordinal; falling


@dataclass(frozen=True)
class Freezes:
    """States that prefill pieces leave behind on their way, each in a block of the record pool of its own.

    The state is, bit by bit, the one that a piece would leave which ended there. A freeze lies between two rows of its
    piece and on the grid of the chunks. Ordered by chunk.
    """

    sequences: Tensor  # [F] int64 index into the batch
    ends: Tensor  # [F] int64 first row of the sequence that the state does not know
    records: Tensor  # [F] int64 block in the record pool that the state is written to, all fields
    chunks: list[int]  # per freeze: index into Chunks.rows of the chunk behind which the state is kept; rising

    def behind(self, first: int, last: int) -> slice:
        """Which of them are kept behind the chunks first .. last - 1."""
        return slice(bisect_left(self.chunks, first), bisect_left(self.chunks, last))


@dataclass(frozen=True)
class Batch:
    """Everything one forward pass needs, computed once on the host. T rows, N sequences, decodes first.

    The first `num_decodes` sequences have exactly one row each, so row i belongs to sequence i there. Every other
    sequence is a prefill piece of one or more rows.
    """

    tokens: Tensor  # [T] int64
    positions: Tensor  # [T] int64, from 0 at the start of each sequence
    query_start: Tensor  # [N + 1] int64, first row of each sequence
    records: Tensor  # [N] int64, block in the record pool
    fresh: Tensor  # [N] bool, the sequence has no history: its state counts as zero whatever the block holds
    pages: Tensor  # [N, P] int64, block in the page pool of each page_size tokens; 0 behind the end
    slots: Tensor  # [T] int64, page * page_size + offset: where the entry of each row goes in the page pool
    lengths: Tensor  # [N] int64, tokens of the sequence after this step
    num_decodes: int
    page_size: int
    chunks: Chunks | None  # None when there is no prefill piece
    freezes: Freezes | None = None  # None when no piece has any
    shared: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)  # what layers compute once for all

    @cached_property
    def arrays(self) -> SimpleNamespace:
        """The host's own view of the tensors as NumPy arrays, by name, for kernels that run there."""
        names = ("positions", "query_start", "records", "fresh", "pages", "slots", "lengths")
        return SimpleNamespace(**{name: getattr(self, name).numpy() for name in names})

    @cached_property
    def prefills(self) -> Batch:
        """The prefill pieces alone, as a batch of their own: rows and sequences are counted from the first of them."""
        rows = self.num_decodes  # one each
        if rows == 0 or self.chunks is None:
            return self
        chunks = replace(self.chunks, rows=self.chunks.rows - rows, sequences=self.chunks.sequences - rows)
        per_row = {name: getattr(self, name)[rows:] for name in ("tokens", "positions", "slots")}
        per_sequence = {name: getattr(self, name)[rows:] for name in ("records", "fresh", "pages", "lengths")}
        start, freezes = self.query_start[rows:] - rows, self.freezes
        if freezes is not None:
            freezes = replace(freezes, sequences=freezes.sequences - rows, ends=freezes.ends - rows)
        tensors = {**per_row, **per_sequence, "query_start": start}
        return replace(self, **tensors, num_decodes=0, chunks=chunks, freezes=freezes, shared={})

    def runs(self, i: int) -> list[tuple[slice, int]]:
        """The rows of sequence i from one kept state to the next, each run with the record block that keeps it.

        The last run ends with the rows and has the sequence's own block; the others are those of its freezes. This is
        for specifications, which go through a batch sequence by sequence.
        """
        ends = [(int(self.query_start[i + 1]), int(self.records[i]))]
        if self.freezes is not None:
            own = self.freezes.sequences == i
            ends = [*zip(self.freezes.ends[own].tolist(), self.freezes.records[own].tolist(), strict=True), *ends]
        starts = [int(self.query_start[i]), *(end for end, _ in ends)]
        return [(slice(start, end), block) for start, (end, block) in zip(starts, ends, strict=False)]

    @property
    def num_sequences(self) -> int:
        return self.records.shape[0]

    @property
    def num_rows(self) -> int:
        return self.tokens.shape[0]


def build_batch(pieces: Sequence[Piece], page_size: int, device: torch.device | str = "cpu") -> Batch:
    """Lay out `pieces`: every one-token piece with a history becomes a decode row, the others are prefills.

    The order of the sequences in the batch is the order of `pieces`, which must have the decodes first and at least
    one token each (`ValueError` otherwise). `page_size` is in tokens. A freeze must lie inside a prefill piece, after a
    multiple of `CHUNK` tokens of the sequence, and go to a block that nothing else in the batch uses (`ValueError`).
    """
    if not pieces:
        raise ValueError("a batch needs at least one piece")
    empty = next((i for i, piece in enumerate(pieces) if len(piece.tokens) == 0), None)
    if empty is not None:
        raise ValueError(f"piece {empty} has no tokens")
    decode = [len(piece.tokens) == 1 and piece.start > 0 for piece in pieces]
    num_decodes = sum(decode)
    if not all(decode[:num_decodes]):
        raise ValueError("decode pieces must come before prefill pieces")
    sizes = np.array([len(piece.tokens) for piece in pieces], dtype=np.int64)
    starts = np.array([piece.start for piece in pieces], dtype=np.int64)
    query_start = np.zeros(len(pieces) + 1, dtype=np.int64)
    np.cumsum(sizes, out=query_start[1:])
    tokens = np.array([token for piece in pieces for token in piece.tokens], dtype=np.int64)
    if num_decodes == len(pieces):  # one row each
        owner, positions = np.arange(num_decodes), starts
    else:
        owner = np.repeat(np.arange(len(pieces)), sizes)
        positions = np.arange(len(tokens)) - query_start[owner] + starts[owner]
    widest = max(len(piece.pages) for piece in pieces)
    pages = np.zeros((len(pieces), max(widest, 1)), dtype=np.int64)
    for row, piece in enumerate(pieces):
        pages[row, : len(piece.pages)] = piece.pages
    slots = positions % page_size
    if widest:
        slots += pages[owner, positions // page_size] * page_size
    chunks = _cut(query_start, starts, num_decodes, device)
    freezes = None
    if any(piece.freezes for piece in pieces):
        freezes = _freeze(pieces, query_start, num_decodes, chunks, device)
    return Batch(
        tokens=torch.from_numpy(tokens).to(device),
        positions=torch.from_numpy(positions).to(device),
        query_start=torch.from_numpy(query_start).to(device),
        records=torch.tensor([piece.record for piece in pieces], dtype=torch.int64, device=device),
        fresh=torch.from_numpy(starts == 0).to(device),
        pages=torch.from_numpy(pages).to(device),
        slots=torch.from_numpy(slots).to(device),
        lengths=torch.from_numpy(starts + sizes).to(device),
        num_decodes=num_decodes,
        page_size=page_size,
        chunks=chunks,
        freezes=freezes,
    )


def _cut(query_start: np.ndarray, starts: np.ndarray, num_decodes: int, device: torch.device | str) -> Chunks | None:
    """Cut the prefill sequences (from `num_decodes` on) into chunks on the grid of their own positions."""
    first, begin = query_start[:-1][num_decodes:], starts[num_decodes:]
    if len(first) == 0:
        return None
    sizes = np.diff(query_start)[num_decodes:]
    grid = begin // CHUNK  # ordinal 0 of a piece is the chunk of the sequence in which it starts
    counts = (begin + sizes - 1) // CHUNK - grid + 1
    order = np.argsort(-counts, kind="stable")
    active = [int((counts > ordinal).sum()) for ordinal in range(int(counts.max()))]
    total = int(query_start[-1])
    rows = []
    for ordinal, number in enumerate(active):
        sequence = order[:number]
        low = np.maximum((grid[sequence] + ordinal) * CHUNK, begin[sequence])  # position of the chunk's first token
        high = np.minimum((grid[sequence] + ordinal + 1) * CHUNK, begin[sequence] + sizes[sequence])
        position = low[:, None] + np.arange(CHUNK)
        row = position - begin[sequence, None] + first[sequence, None]
        rows.append(np.where(position < high[:, None], row, total))
    return Chunks(
        rows=torch.from_numpy(np.concatenate(rows)).to(device),
        sequences=torch.from_numpy(order + num_decodes).to(device),
        active=active,
    )


def _freeze(
    pieces: Sequence[Piece],
    query_start: np.ndarray,
    num_decodes: int,
    chunks: Chunks | None,
    device: torch.device | str,
) -> Freezes:
    """The freezes of all pieces by chunk. Raises ValueError for one that its piece or its block does not allow."""
    used = {piece.record for piece in pieces}
    found = []  # (chunk, sequence, end, block)
    rank = {} if chunks is None else {i: place for place, i in enumerate(chunks.sequences.tolist())}
    first = [0, *accumulate(chunks.active)] if chunks is not None else []  # chunk of every ordinal
    for i, piece in enumerate(pieces):
        stop = piece.start + len(piece.tokens)
        for position, block in piece.freezes:
            if i < num_decodes:
                raise ValueError(f"piece {i} is a decode row, it cannot freeze a state on its way")
            if not piece.start < position < stop:
                raise ValueError(
                    f"piece {i} has the tokens {piece.start} to {stop}, it cannot freeze the state behind {position}"
                )
            if position % CHUNK:
                raise ValueError(f"piece {i} cannot freeze the state behind {position} tokens, no multiple of {CHUNK}")
            if block in used:
                raise ValueError(f"piece {i} cannot freeze a state to block {block}, which the batch uses already")
            used.add(block)
            ordinal = position // CHUNK - 1 - piece.start // CHUNK
            end = int(query_start[i]) + position - piece.start
            found.append((first[ordinal] + rank[i], i, end, block))
    found.sort()
    by_chunk, *columns = zip(*found, strict=True)
    sequences, ends, records = (torch.tensor(column, dtype=torch.int64, device=device) for column in columns)
    return Freezes(sequences, ends, records, list(by_chunk))
