"""The arithmetic is exact enough: decays in float32, records in bfloat16, inputs and gates at their extremes."""

from __future__ import annotations

import torch
from torch import Tensor

from statewise.conformance.check import check
from statewise.conformance.findings import Evidence, NotApplicableError, largest, relative
from statewise.conformance.stage import Stage
from statewise.conformance.subject import LIMITS, Subject

DECAY_LIMIT = 5e-5  # of states that only decay, in any dtype of the layer; a rate in bfloat16 is off by up to 2e-3
SILENCE = (1, 7, 24, 96, 384)  # tokens of the pieces without input
GONE = 1e-6  # of a state's first scale
FLUSH = 16  # tokens of silence that empty a window of past inputs
ROUNDINGS = 4
MARGIN = 20.0  # how much more an output may change than the reference does when its input is rounded


@check(
    "decay in silence",
    "Without input a state decays as the fp64 reference says, to float32, whatever the dtype of the layer.",
    "Keep slopes, A_log, dt_bias and the decays made of them in float32: in bfloat16 they are off by more each token.",
    scopes=("record",),
    reference=True,
)
def decay_in_silence(subject: Subject, evidence: Evidence) -> None:
    precise = [name for name, field in subject.spec.items() if field.dtype == torch.float32]
    if not precise:
        raise NotApplicableError("no field of the state is float32")
    width = subject.config.hidden_size
    silent = {name: torch.zeros_like(field) for name, field in subject.fresh().items()}
    subject.reference(torch.zeros(8, width), silent, 8)
    if any(bool(field.any()) for field in silent.values()):
        raise NotApplicableError("the layer writes to its state without input")
    before = subject.fresh()
    subject.reference(subject.hidden(96, seed=7), before)
    stage = Stage(subject.layer())
    sequence = stage.resume(before, 96)
    stage.run(sequence, torch.zeros(FLUSH, width, dtype=subject.dtype), [1] * FLUSH)
    subject.reference(torch.zeros(FLUSH, width), before, 96)
    state = {name: field.double() for name, field in stage.state(sequence).items()}
    for name in precise:
        evidence.close(f"state '{name}' behind {FLUSH} tokens of silence", state[name], before[name], subject.limit)
    # What has all but vanished counts by what it was: it may have fallen below the smallest float32.
    floor = {name: GONE * largest(field) for name, field in state.items()}
    total = 0
    for tokens in SILENCE:
        subject.reference(torch.zeros(tokens, width), state, sequence.length)
        stage.run(sequence, torch.zeros(tokens, width, dtype=subject.dtype))
        total += tokens
        for name in precise:
            what = f"state '{name}' behind {total} tokens of silence"
            scale = max(largest(state[name], default=0.0), floor[name])
            evidence.close(what, stage.state(sequence)[name], state[name], DECAY_LIMIT, scale=scale)


@check(
    "bfloat16 records",
    "With record_dtype=bfloat16 the outputs stay within the rounding of the state.",
    "Read the state into float32, calculate there, and round once where it is written back.",
    scopes=("record",),
)
def bfloat16_records(subject: Subject, evidence: Evidence) -> None:
    layer = subject.layer(record_dtype=torch.bfloat16)
    if dict(layer.state_spec()) == dict(subject.spec):
        raise NotApplicableError("no field of the state follows record_dtype")
    hidden, sizes = subject.hidden(190), [100, 30, *[1] * 40]
    full, half = Stage(subject.layer()), Stage(layer)
    ours, theirs = full.start(), half.start()
    goal, output = full.run(ours, hidden, sizes), half.run(theirs, hidden, sizes)
    evidence.close("the output", output, goal, LIMITS[torch.bfloat16], rows="token")
    for name, field in half.state(theirs).items():
        evidence.close(f"state '{name}'", field, full.state(ours)[name], LIMITS[torch.bfloat16])


@check(
    "extreme input",
    "Zeros, tiny and huge inputs and saturated gates give finite outputs, equal to the reference's where it is stable.",
    "Look for an exponent that can be positive, a division by a norm without epsilon, a difference of large sums, or "
    "infinity times zero.",
)
def extreme_input(subject: Subject, evidence: Evidence) -> None:
    rows = subject.hidden(80, seed=8)
    sparse = rows.clone()
    sparse[torch.arange(len(rows)) % 7 != 0] = 0
    cases: list[tuple[str, Subject, Tensor]] = [
        ("zeros", subject, rows * 0),
        ("inputs times 1e-6", subject, rows * 1e-6),
        ("inputs times 1e3", subject, rows * 1e3),
        ("one row of seven not zero", subject, sparse),
        ("matrices times 30 (saturated gates)", subject.amplified(30.0), rows),
    ]
    for label, which, hidden in cases:
        stage = Stage(which.layer())
        sequence = stage.start()
        output = stage.run(sequence, hidden, [70])
        decodes = Stage(which.layer())
        single = decodes.start()
        stepped = decodes.run(single, hidden, [1] * len(hidden))
        for what, values in (("the output", output), ("the output one by one", stepped)):
            evidence.hold(bool(torch.isfinite(values).all()), f"{what} for {label} has NaN or infinity")
        for values in (*stage.state(sequence).values(), *decodes.state(single).values()):
            evidence.hold(bool(torch.isfinite(values).all()), f"a state for {label} has NaN or infinity")
        if which.has_reference and not evidence.problems:
            state = which.fresh()
            goal = which.reference(hidden, state)
            limit = which.limit
            if max(relative(output, goal), relative(stepped, goal)) > limit:
                limit = max(limit, MARGIN * _conditioning(which, hidden, goal))
            if limit < 1:
                evidence.close(f"the output for {label}", output, goal, limit, rows="token")
                evidence.close(f"the output one by one for {label}", stepped, goal, limit, rows="token")


def _conditioning(subject: Subject, hidden: Tensor, goal: Tensor) -> float:
    """How far the reference's output moves, relative to its scale, when the input is rounded (the worst of some)."""
    generator = torch.Generator().manual_seed(9)
    moved = 0.0
    for _ in range(ROUNDINGS):
        noise = torch.randn(hidden.shape, generator=generator, dtype=torch.float64)
        nudged = hidden.double() * (1 + noise * torch.finfo(subject.dtype).eps)
        moved = max(moved, relative(subject.reference(nudged, subject.fresh()), goal))
    return moved
