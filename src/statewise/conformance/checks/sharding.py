"""Several ranks together calculate what one rank alone does."""

from __future__ import annotations

import torch
from torch import Tensor

from statewise.conformance.check import check
from statewise.conformance.findings import Evidence
from statewise.conformance.ranks import Group, Member
from statewise.conformance.stage import Stage
from statewise.conformance.subject import Subject
from statewise.layers.mixer import TokenMixer
from statewise.memory.blocks import Field

Results = tuple[list[Tensor], list[dict[str, Tensor]]]
HINT = (
    "Every rank keeps the heads that Slot.ranges and the field's Shard give it, and the output projection sums over "
    "the ranks once."
)


@check("2 ranks", "The outputs of 2 ranks, and their states put together, are those of one rank.", HINT)
def two_ranks(subject: Subject, evidence: Evidence) -> None:
    _together(subject, evidence, 2)


@check("4 ranks", "The outputs of 4 ranks, and their states put together, are those of one rank.", HINT)
def four_ranks(subject: Subject, evidence: Evidence) -> None:
    _together(subject, evidence, 4)


def _together(subject: Subject, evidence: Evidence, size: int) -> None:
    goal, expected = _serve(subject, subject.layer())

    def rank(member: Member) -> Results:
        return _serve(subject, subject.layer(member))

    results = Group(size).run(rank)
    for member, (outputs, _) in enumerate(results):
        for i, (output, ours) in enumerate(zip(outputs, goal, strict=True)):
            evidence.close(f"output {i} of rank {member} of {size}", output, ours, subject.limit, rows="token")
    for i, whole in enumerate(expected):
        for name, field in whole.items():
            parts = [states[i][name] for _, states in results]
            what = f"state '{name}' put together from {size} ranks"
            axis_before = field.ndim - len(subject.spec[name].shape)  # 1 for the tokens of pages
            evidence.close(
                what, _put_together(subject.spec[name], parts, field, axis_before, evidence), field, subject.limit
            )


def _serve(subject: Subject, layer: TokenMixer) -> Results:
    """Two prompts, then decodes beside a third prompt and a second piece."""
    stage = Stage(layer)
    long, short, late = stage.start(), stage.start(), stage.start()
    hidden = [subject.hidden(count, seed=30 + i) for i, count in enumerate((90, 4, 30))]
    outputs = stage.step([(long, hidden[0][:70]), (short, hidden[1][:1])])
    outputs += stage.step([(short, hidden[1][1:2]), (long, hidden[0][70:89]), (late, hidden[2])])
    outputs += stage.step([(long, hidden[0][89:]), (short, hidden[1][2:3])])
    outputs += stage.step([(short, hidden[1][3:])])
    return outputs, [stage.state(sequence) for sequence in (long, short, late)]


def _put_together(field: Field, parts: list[Tensor], whole: Tensor, shift: int, evidence: Evidence) -> Tensor:
    """The whole field out of the ranks' parts. What several ranks hold must be the same on all of them."""
    if field.shard is None:
        for part in parts[1:]:
            evidence.same("a field that every rank keeps whole", part, parts[0])
        return parts[0]
    axis, result = field.shard.axis + shift, torch.full_like(whole, float("nan"))
    for rank, part in enumerate(parts):
        begin = 0
        for start, stop in field.shard.ranges(field.shape[field.shard.axis], rank, len(parts)):
            piece = part.narrow(axis, begin, stop - start)
            target = result.narrow(axis, start, stop - start)
            if bool(torch.isfinite(target).any()):
                evidence.same(f"what rank {rank} shares with the rank before it", piece, target)
            target.copy_(piece)
            begin += stop - start
    return result
