"""The declared state is what the layer keeps: its size, its types, and how it is cut for several ranks."""

from __future__ import annotations

import torch

from statewise.conformance.check import check
from statewise.conformance.findings import Evidence
from statewise.conformance.ranks import Group
from statewise.conformance.stage import LAYER, Stage
from statewise.conformance.subject import Subject
from statewise.memory.blocks import Field

SIZES = (2, 4)
MARKER = 9_984.0  # the same number in float32 and bfloat16; no layer writes it by itself


@check(
    "record size",
    "The spec has the bytes, shapes and types that the pool lays out, and a new sequence defines every entry.",
    "state_spec() must declare exactly what forward() keeps: an entry that is never written holds what another "
    "sequence left there.",
)
def record_size(subject: Subject, evidence: Evidence) -> None:
    layer = subject.layer()
    evidence.hold(len(subject.spec) > 0, "state_spec() declares no field")
    evidence.hold(
        dict(layer.state_spec()) == dict(subject.spec), "state_spec() gives another answer once the layer is loaded"
    )
    stage = Stage(layer)
    for view in stage.views.values():
        view.fill_(MARKER)
    sequence = stage.start()
    stage.run(sequence, subject.hidden(70))
    for name, field in stage.state(sequence).items():
        expected = stage.spec[name]
        tokens = stage.page_size if subject.scope == "page" else 1
        evidence.hold(
            stage.views[name][0].nbytes == expected.nbytes == subject.spec[name].nbytes * tokens,
            f"field '{name}' has {stage.views[name][0].nbytes} bytes in the pool, {expected.nbytes} in the spec",
        )
        untouched = field == MARKER
        where = untouched.nonzero()
        evidence.hold(
            not len(where),
            f"{len(where):,} of {field.numel():,} entries of state '{name}' are never written"
            + (f", the first at {where[0].tolist()}" if len(where) else ""),
        )
    block = sum(-(-field.nbytes // 64) * 64 for field in stage.spec.values())
    evidence.hold(
        stage.pool.spec.nbytes == 3 * block and stage.pool.spec.offsets[LAYER, next(iter(stage.spec))] == block,
        f"three such layers take {stage.pool.spec.nbytes} bytes, their fields {3 * block}",
    )
    evidence.hold(
        dict(layer.state_spec()) == dict(subject.spec), "state_spec() gives another answer once the layer has run"
    )


@check(
    "rank cuts",
    "2 and 4 ranks together hold every entry of every field, once, and say the same of the whole.",
    "Check axis, unit and segments of the field's Shard; state_spec() describes all ranks together, on every rank.",
)
def rank_cuts(subject: Subject, evidence: Evidence) -> None:
    for size in SIZES:
        for member in Group(size).members:
            whole = subject.bare(member).state_spec()
            evidence.hold(
                dict(whole) == dict(subject.spec),
                f"rank {member.rank} of {size} describes another state than one rank alone: "
                "state_spec() must give the shapes of all ranks together",
            )
        for name, field in subject.spec.items():
            _covered(name, field, size, evidence)


def _covered(name: str, field: Field, size: int, evidence: Evidence) -> None:
    shard = field.shard
    if shard is None:
        return
    length = field.shape[shard.axis]
    held = torch.zeros(length, dtype=torch.int64)
    for rank in range(size):
        mine = 0
        for start, stop in shard.ranges(length, rank, size):
            held[start:stop] += 1
            mine += stop - start
        cut = field.per_rank(rank, size)
        evidence.hold(
            cut.shape[shard.axis] == mine, f"rank {rank} of {size} has {cut.shape[shard.axis]} entries of '{name}'"
        )
    lost, doubled = int((held == 0).sum()), int((held > 1).sum())
    evidence.hold(not lost, f"{lost} of {length} entries of '{name}' are on none of {size} ranks")
    evidence.hold(
        shard.shared or not doubled, f"{doubled} of {length} entries of '{name}' are on several of {size} ranks"
    )
