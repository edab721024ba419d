"""A sequence without history starts from nothing, whatever its block held."""

from __future__ import annotations

from torch import Tensor

from statewise.conformance.check import check
from statewise.conformance.findings import Evidence
from statewise.conformance.stage import Sequence, Stage
from statewise.conformance.subject import Subject

LENGTHS = (2, 5, 70)
FRESH_HINT = "Where batch.fresh[i] is set, the state of sequence i counts as zero: set it to zero, do not multiply."


@check(
    "fresh record",
    "A new sequence in a dirty block is as good as in a block of zeros, bit for bit, even if it held NaN.",
    FRESH_HINT,
)
def fresh_record(subject: Subject, evidence: Evidence) -> None:
    hidden = [subject.hidden(length, seed=length) for length in LENGTHS]
    goal, expected = _start(subject, hidden, 0.0)
    # The pool zeroes pages when it hands them out, and their owner overwrites them: numbers, but never NaN.
    for filler in (None, 1e4) if subject.scope == "page" else (None, 1e4, float("nan")):
        label = "random numbers" if filler is None else str(filler)
        outputs, states = _start(subject, hidden, filler)
        for length, output, ours, state, theirs in zip(LENGTHS, outputs, goal, states, expected, strict=True):
            what = f"a new sequence of {length} tokens in a block of {label}"
            evidence.same(f"the output of {what}", output, ours, rows="token")
            for name in state:
                evidence.same(f"state '{name}' of {what}", state[name], theirs[name])


@check(
    "recycled record",
    "A block that another sequence has used serves a new one bit for bit like a clean one.",
    FRESH_HINT,
    scopes=("record",),
)
def recycled_record(subject: Subject, evidence: Evidence) -> None:
    hidden = subject.hidden(70)
    clean = Stage(subject.layer())
    first = clean.start()
    for view in clean.views.values():
        view.zero_()
    goal = clean.run(first, hidden, [66, 1, 1])
    used = Stage(subject.layer())
    former = used.start()
    used.run(former, subject.hidden(90, seed=4), [80, 5])
    again = used.start(former.record)
    evidence.same("the output", used.run(again, hidden, [66, 1, 1]), goal, rows="token")
    for name, field in used.state(again).items():
        evidence.same(f"state '{name}'", field, clean.state(first)[name])


@check(
    "one-token prompt",
    "A prompt of one token starts from nothing, also beside decodes, and its next token continues it.",
    "A one-token prompt is no decode: batch.fresh is set for it. Do not tell a new sequence by its length or its rows.",
)
def one_token_prompt(subject: Subject, evidence: Evidence) -> None:
    hidden, other = subject.hidden(3, seed=5), subject.hidden(21, seed=6)
    goal, expected = _start(subject, [hidden[:1]], 0.0)
    stage = Stage(subject.layer())
    neighbour, prompt = stage.start(), stage.start()
    stage.run(neighbour, other[:20])
    output = stage.step([(neighbour, other[20:]), (prompt, hidden[:1])])[1]
    evidence.close("the output of the first token in a dirty block", output, goal[0], subject.limit)
    for name, field in stage.state(prompt).items():
        evidence.close(f"state '{name}' behind the first token", field, expected[0][name], subject.limit)
    if subject.has_reference:
        state = subject.fresh()
        wanted = subject.reference(hidden, state)
        evidence.close("the output of the first token", output, wanted[:1], subject.limit)
        following = stage.run(prompt, hidden[1:], [1, 1])
        evidence.close("the output of the tokens behind it", following, wanted[1:], subject.limit, rows="token")
        for name, field in stage.state(prompt).items():
            evidence.close(f"state '{name}' behind three tokens", field, state[name], subject.limit)


def _start(
    subject: Subject, hidden: list[Tensor], filler: float | None
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """New sequences in one batch, in blocks that hold nothing but `filler` (None: random numbers)."""
    stage = Stage(subject.layer())
    if filler is not None:
        for view in stage.views.values():
            view.fill_(filler)
    sequences: list[Sequence] = [stage.start() for _ in hidden]
    outputs = stage.step(list(zip(sequences, hidden, strict=True)))
    return outputs, [stage.state(sequence) for sequence in sequences]
