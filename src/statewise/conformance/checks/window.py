"""Options that widen a window of past inputs or turn it round in memory change nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from statewise.conformance.check import check
from statewise.conformance.findings import Evidence, NotApplicableError
from statewise.conformance.stage import Stage
from statewise.conformance.subject import Subject
from statewise.ops.short_convolution import shift_window

NUM_SPEC = 3
SIZES = (1, 1, 28, 36, 1, 33, 1)


@check(
    "draft columns",
    f"A window widened by num_spec={NUM_SPEC} gives the same outputs, and its newest columns can take tokens back.",
    "Only the newest columns are the window; the older ones are kept so that a rejected draft can be undone.",
    scopes=("record",),
)
def draft_columns(subject: Subject, evidence: Evidence) -> None:
    wide = subject.layer(num_spec=NUM_SPEC)
    spec = wide.state_spec()
    widened = {name: field.shape[-1] for name, field in subject.spec.items() if spec[name].shape != field.shape}
    if not widened:
        raise NotApplicableError("no field of the state grows with num_spec")
    for name in widened:
        shape = subject.spec[name].shape
        evidence.hold(
            spec[name].shape == (*shape[:-1], shape[-1] + NUM_SPEC),
            f"state '{name}' grows from {list(shape)} to {list(spec[name].shape)}: num_spec must widen its last axis",
        )
    hidden = subject.hidden(sum(SIZES))
    goal, states = _run(Stage(subject.layer()), hidden)
    output, wider = _run(Stage(wide), hidden)
    evidence.same("the output", output, goal, rows="token")
    for name, field in wider[-1].items():
        columns = widened.get(name)
        newest = field if columns is None else field[..., -columns:]
        evidence.same(f"state '{name}'" + (", newest columns" if columns else ""), newest, states[-1][name])
        # Two tokens back: the window must be what it was then.
        if columns and field.ndim == 2:
            window = field[None].clone()
            shift_window(window, torch.tensor([0]), torch.tensor([2]))
            evidence.same(
                f"state '{name}' with the last two tokens taken back", window[0, :, -columns:], states[-2][name]
            )


@check(
    "window order",
    "With conv_channels_last the window lies the other way round in memory and nothing else changes.",
    "Go by the strides of state[...], which the field's order gives; assume no memory order.",
    scopes=("record",),
)
def window_order(subject: Subject, evidence: Evidence) -> None:
    other = subject.layer(conv_channels_last=True)
    if dict(other.state_spec()) == dict(subject.spec):
        raise NotApplicableError("no field of the state follows conv_channels_last")
    hidden = subject.hidden(sum(SIZES))
    goal, states = _run(Stage(subject.layer()), hidden)
    output, turned = _run(Stage(other), hidden)
    evidence.same("the output", output, goal, rows="token")
    for name, field in turned[-1].items():
        evidence.same(f"state '{name}'", field, states[-1][name])


def _run(stage: Stage, hidden: Tensor) -> tuple[Tensor, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """The outputs of all rows, and the states two tokens before the end and at the end."""
    sequence = stage.start()
    first = stage.run(sequence, hidden[:-2], SIZES[:-2])
    before = stage.state(sequence)
    rest = stage.run(sequence, hidden[-2:], [1, 1])
    return torch.cat([first, rest]), (before, stage.state(sequence))
