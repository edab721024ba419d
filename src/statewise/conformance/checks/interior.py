"""States that a long piece leaves behind on its way: each as if the piece had ended there, at the cost of a copy."""

from __future__ import annotations

import random
from collections.abc import Sequence as SequenceOf
from typing import Any

import torch
from torch import Tensor

from statewise.conformance.check import check
from statewise.conformance.findings import Evidence, NotApplicableError
from statewise.conformance.stage import Sequence, Stage
from statewise.conformance.subject import Subject
from statewise.ops.batch import CHUNK, Piece, build_batch

OPTIONS: tuple[dict[str, Any], ...] = ({}, {"num_spec": 2}, {"conv_channels_last": True})
HISTORIES = (0, 1, 37, CHUNK - 1, CHUNK, 100)  # tokens before a piece: on and off the grid
DECODED = 20  # tokens before the decode beside the pieces
MOST = 2  # freezes per piece

Work = SequenceOf[tuple[Sequence, Tensor, list[tuple[int, int]]]]  # sequence, its rows, its freezes


@check(
    "interior states",
    "The states that pieces leave on their way are those of pieces that end there, and nothing else changes.",
    "Between two chunks, write every field of the state behind the row before batch.freezes.ends[f], of sequence "
    "batch.freezes.sequences[f], to block batch.freezes.records[f].",
    scopes=("record",),
)
def interior_states(subject: Subject, evidence: Evidence) -> None:
    if not subject.layer_class.capabilities.interior_states:
        raise NotApplicableError("its capabilities do not list interior_states: a piece ends where a state is wanted")
    for seed, options in enumerate(OPTIONS):
        plain, frozen = (Stage(subject.layer(**options), seed=seed) for _ in range(2))
        goal = _step(plain, [(sequence, rows, []) for sequence, rows, _ in _scene(subject, plain, seed)])
        work = _scene(subject, frozen, seed)
        before = [frozen.state(sequence) for sequence, _, _ in work]
        evidence.same("the output beside states that are kept", _step(frozen, work), goal, rows="row")
        targets = [(Sequence(block), 0) for _, _, freezes in work for _, block in freezes]
        changed = ((frozen.pool.arena != plain.pool.arena) & ~frozen.owned(targets)).nonzero()
        evidence.hold(
            not len(changed),
            f"{len(changed):,} bytes beside the states that are kept differ from a step that keeps none"
            + (f", the first in block {int(changed[0, 0])}" if len(changed) else ""),
        )
        alone = Stage(subject.layer(**options), seed=seed + 1)
        for (sequence, rows, freezes), state in zip(work, before, strict=True):
            for position, block in freezes:
                count = position - sequence.length
                ended = alone.resume(state, sequence.length) if sequence.length else alone.start()
                alone.run(ended, rows[:count])
                limit = subject.limit_of_rows if count > 1 else subject.limit  # one token is a decode: other sums
                for name, field in frozen.state(Sequence(block)).items():
                    what = f"state '{name}' kept behind {position} tokens, {count} of them in the piece"
                    evidence.close(what, field, alone.state(ended)[name], limit)


def _scene(subject: Subject, stage: Stage, seed: int) -> Work:
    """A decode and three prefill pieces, their histories done, with random freezes to blocks full of rubbish."""
    chosen = random.Random(seed)
    decode, token = stage.start(), subject.hidden(DECODED + 1, seed=49)
    stage.run(decode, token[:DECODED])
    work: list[tuple[Sequence, Tensor, list[tuple[int, int]]]] = [(decode, token[DECODED:], [])]
    for i, history in enumerate(chosen.sample(HISTORIES, 3)):
        count = chosen.randint(CHUNK + 1, 4 * CHUNK)
        sequence, hidden = stage.start(), subject.hidden(history + count, seed=50 + i)
        if history:
            stage.run(sequence, hidden[:history])
        grid = range(history - history % CHUNK + CHUNK, history + count, CHUNK)
        positions = chosen.sample(grid, min(MOST, len(grid)))
        work.append((sequence, hidden[history:], [(position, stage.start().record) for position in positions]))
    return work


def _step(stage: Stage, work: Work) -> Tensor:
    """The output rows of one call of the layer on all of the work."""
    pieces = [
        Piece(range(len(rows)), sequence.length, sequence.record, freezes=freezes) for sequence, rows, freezes in work
    ]
    batch = build_batch(pieces, stage.page_size, stage.layer.engine_config.device)
    output: Tensor = stage.layer(torch.cat([rows for _, rows, _ in work]), batch, stage.views)
    return output
