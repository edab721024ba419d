"""Rounding errors do not pile up over a long input: the drift curve."""

from __future__ import annotations

from statewise.conformance.check import check
from statewise.conformance.findings import Evidence, Point
from statewise.conformance.stage import Stage
from statewise.conformance.subject import Subject

PIECE = 2_048  # rows per step, as the engine's default cuts a prompt
WINDOW = 64  # last rows whose outputs are compared at each point of the curve
PAGED_LONG = 2_048  # the reference of softmax attention takes quadratic time
SCALE_FROM = 64


@check(
    "long input",
    "Chunked prefill stays near the fp64 recurrence over a long input; the curve shows the error at powers of two.",
    "An error that grows with the length comes from a decay that is slightly wrong or from a state kept too coarsely.",
    reference=True,
)
def long_input(subject: Subject, evidence: Evidence) -> None:
    long = subject.long if subject.scope == "record" else min(subject.long, PAGED_LONG)
    stage = Stage(subject.layer(), tokens=long)
    sequence, state = stage.start(), subject.fresh()
    done, mark = 0, min(SCALE_FROM, long)
    while done < long:
        # Between two marks only the last rows are compared; all pass through both.
        hidden = subject.hidden(mark - done, seed=100 + done)
        goal = subject.reference(hidden, state, done)[-WINDOW:]
        output = stage.run(sequence, hidden, [PIECE] * ((len(hidden) - 1) // PIECE))[-WINDOW:]
        done, mark = mark, min(2 * mark, long)
        kept = stage.state(sequence)
        errors = [
            evidence.close(f"state '{name}' behind {done:,} tokens", field, state[name], subject.limit)
            for name, field in kept.items()
        ]
        error = evidence.close(f"the output before token {done:,}", output, goal, subject.limit)
        evidence.curve.append(Point(done, error, max(errors)))
