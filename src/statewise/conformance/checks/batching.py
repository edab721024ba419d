"""What is in a batch besides does not matter, and what is not in it is not touched."""

from __future__ import annotations

import torch
from torch import Tensor

from statewise.conformance.check import check
from statewise.conformance.findings import Evidence
from statewise.conformance.stage import Sequence, Stage
from statewise.conformance.subject import Subject

DECODES = (20, 64, 100)  # tokens before the decoded one
PREFILLS = ((0, 1), (0, 70), (33, 50), (64, 64))  # (tokens before, tokens of the piece)
ORDERS = ((0, 1, 2, 3, 4, 5, 6), (2, 0, 1, 6, 4, 3, 5), (1, 2, 0, 5, 6, 3, 4))


@check(
    "batch order",
    "A sequence gets the same answer alone, in any order and beside any neighbours: float32 decodes but for rounding.",
    "Take rows by batch.query_start and blocks by batch.records; the arithmetic of one sequence must not depend on the "
    "others.",
)
def batch_order(subject: Subject, evidence: Evidence) -> None:
    goal, expected = _mixed(subject, None)
    moved = 0.0
    for order in ORDERS:
        outputs, states = _mixed(subject, order)
        for i, (output, ours, state, theirs) in enumerate(zip(outputs, goal, states, expected, strict=True)):
            decode = i < len(DECODES)
            what = f"a decode behind {DECODES[i]}" if decode else "a piece of {1} behind {0}".format(*PREFILLS[i - 3])
            what = f"{what} tokens, in the order {''.join(map(str, order))}"
            limit = subject.limit_of_rows if decode else subject.limit
            errors = [evidence.close(f"the output of {what}", output, ours, limit, rows="token")]
            for name in state:
                errors.append(evidence.close(f"state '{name}' of {what}", state[name], theirs[name], limit))
            moved = max(moved, *errors) if decode else moved
    if moved and subject.dtype == torch.float32:
        evidence.remark = (
            f"a decode moves by up to {moved:.1e} with what is beside it: a plain matrix product rounds differently "
            "for another number of rows, Linear does not"
        )


@check(
    "other blocks",
    "A step writes nothing but the state of the sequences in its batch: no other block, no padding.",
    "Look for a write through a wrong block index, by rows instead of records, or past the end of a field.",
)
def other_blocks(subject: Subject, evidence: Evidence) -> None:
    stage, work = _scene(subject, tuple(range(7)))
    before = stage.pool.arena.clone()
    owned = stage.owned([(sequence, len(rows)) for sequence, rows in work])
    stage.step(work)
    changed = ((stage.pool.arena != before) & ~owned).nonzero()
    if len(changed):
        block, byte = changed[0].tolist()
        evidence.problems.append(
            f"{len(changed):,} bytes that no sequence of the batch owns were changed, the first in block {block}: "
            f"{_whose(stage, byte)}"
        )


@check(
    "empty piece",
    "A piece of no tokens is refused before a layer sees it, or changes nothing.",
    "An empty piece has no rows: its record must stay as it is, and the others must not notice.",
)
def empty_piece(subject: Subject, evidence: Evidence) -> None:
    stage, work = _scene(subject, tuple(range(7)))
    empty = work[5][0]  # one with a history: it has something to lose
    try:
        batch = stage.batch([*((sequence, len(rows)) for sequence, rows in work[:5]), (empty, 0)])
    except ValueError:
        return  # no layer ever sees one
    goal = stage.state(empty)
    with torch.inference_mode():
        stage.layer(torch.cat([rows for _, rows in work[:5]]), batch, stage.views)
    for name, field in stage.state(empty).items():
        evidence.same(f"state '{name}' of the empty piece", field, goal[name])


def _scene(subject: Subject, order: tuple[int, ...] | list[int]) -> tuple[Stage, list[tuple[Sequence, Tensor]]]:
    """Some of three decodes and four prefill pieces, their histories done, each in the block that its number gives."""
    stage = Stage(subject.layer(), seed=sum(order))
    work = []
    for i in order:
        before, count = (DECODES[i], 1) if i < len(DECODES) else PREFILLS[i - len(DECODES)]
        hidden = subject.hidden(before + count, seed=10 + i)
        sequence = stage.start()
        if before:
            stage.run(sequence, hidden[:before])
        work.append((sequence, hidden[before:]))
    return stage, work


def _mixed(subject: Subject, order: tuple[int, ...] | None) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Outputs and states of the seven, by number; in one batch of that order, or each alone (None)."""
    count = len(DECODES) + len(PREFILLS)
    outputs: dict[int, Tensor] = {}
    states: dict[int, dict[str, Tensor]] = {}
    for group in [[i] for i in range(count)] if order is None else [list(order)]:
        stage, work = _scene(subject, group)
        for i, output, (sequence, _) in zip(group, stage.step(work), work, strict=True):
            outputs[i], states[i] = output, stage.state(sequence)
    return [outputs[i] for i in range(count)], [states[i] for i in range(count)]


def _whose(stage: Stage, byte: int) -> str:
    for (layer, name), offset in stage.pool.spec.offsets.items():
        field = stage.pool.spec.layers[layer][name]
        if offset <= byte < offset + field.nbytes:
            return f"its field '{name}'" if layer == 1 else f"a field '{name}' of another layer"
    return "the padding behind a field"
