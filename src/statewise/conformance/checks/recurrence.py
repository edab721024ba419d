"""The layer calculates its specification, however a sequence is cut and wherever it starts."""

from __future__ import annotations

import random

from statewise.conformance.check import check
from statewise.conformance.findings import Evidence
from statewise.conformance.stage import Stage
from statewise.conformance.subject import Subject
from statewise.ops.batch import CHUNK

TOKENS = 2 * CHUNK + 22  # two chunks and a part of one
HISTORY = 37  # tokens behind which a restored state is continued: not on the grid of the chunks
MAXIMUM = 4_096  # rows of the longest piece: twice the engine's default


@check(
    "specification",
    "One pass over a prompt gives the outputs and the final state of the fp64 reference.",
    "If it goes wrong from a multiple of 64 on, look at what passes from chunk to chunk; if only a state is wrong, at "
    "how it is laid out (axes swapped?).",
    reference=True,
)
def specification(subject: Subject, evidence: Evidence) -> None:
    hidden, expected = subject.hidden(TOKENS), subject.fresh()
    goal = subject.reference(hidden, expected)
    stage = Stage(subject.layer())
    sequence = stage.start()
    evidence.close("the output", stage.run(sequence, hidden), goal, subject.limit, rows="token")
    for name, field in stage.state(sequence).items():
        evidence.close(f"state '{name}'", field, expected[name], subject.limit)


@check(
    "any split",
    "One token at a time, one pass and random pieces give the same outputs and the same state.",
    "Decode step and chunked prefill disagree, or a piece does not take up the state where the last one left it.",
)
def any_split(subject: Subject, evidence: Evidence) -> None:
    hidden = subject.hidden(TOKENS)
    whole_stage = Stage(subject.layer())
    whole = whole_stage.start()
    goal, expected = whole_stage.run(whole, hidden), whole_stage.state(whole)
    for label, sizes in (("one token at a time", [1] * TOKENS), *_random_cuts(TOKENS)):
        stage = Stage(subject.layer())
        sequence = stage.start()
        output = stage.run(sequence, hidden, sizes)
        evidence.close(f"the output in pieces ({label})", output, goal, subject.limit, rows="token")
        for name, field in stage.state(sequence).items():
            evidence.close(f"state '{name}' behind pieces ({label})", field, expected[name], subject.limit)


@check(
    "chunk grid",
    "Pieces that end on multiples of 64 tokens leave the same state, in float32 but for rounding.",
    "A state must not depend on how a prompt was cut: cut chunks where batch.chunks does, and do not let the "
    "arithmetic of one chunk depend on the others.",
    scopes=("record",),
)
def chunk_grid(subject: Subject, evidence: Evidence) -> None:
    hidden = subject.hidden(3 * CHUNK + 22)
    states = []
    for sizes in ([], [CHUNK], [2 * CHUNK], [CHUNK, CHUNK, CHUNK]):
        stage = Stage(subject.layer())
        sequence = stage.start()
        stage.run(sequence, hidden, sizes)
        states.append((sizes, stage.state(sequence)))
    for sizes, state in states[1:]:
        for name, field in state.items():
            what = f"state '{name}' behind pieces of {sizes} and the rest"
            evidence.close(what, field, states[0][1][name], subject.limit_of_rows)


@check(
    "initial state",
    "A state that the reference made is continued as the reference continues it, by pieces of any length.",
    "The layer does not read the state as its specification leaves it: wrong axes, order, offset or position.",
    reference=True,
)
def initial_state(subject: Subject, evidence: Evidence) -> None:
    before = subject.fresh()
    subject.reference(subject.hidden(HISTORY, seed=1), before)
    for size in (1, 2, CHUNK - HISTORY, CHUNK, TOKENS):
        hidden = subject.hidden(size, seed=2)
        stage = Stage(subject.layer())
        sequence = stage.resume(before, HISTORY)
        # What the layer is given is rounded to the dtype of its state, and so the reference starts from that.
        expected = {name: field.double() for name, field in stage.state(sequence).items()}
        goal = subject.reference(hidden, expected, HISTORY)
        output = stage.run(sequence, hidden)
        label = f"a piece of {size} behind {HISTORY} tokens"
        evidence.close(f"the output of {label}", output, goal, subject.limit, rows="token")
        for name, field in stage.state(sequence).items():
            evidence.close(f"state '{name}' behind {label}", field, expected[name], subject.limit)


@check(
    "maximum length",
    f"A piece of {MAXIMUM:,} tokens beside one-token pieces gives what smaller pieces give.",
    "Look for a buffer of fixed size, an index that overflows, or rows of one sequence taken for those of another.",
)
def maximum_length(subject: Subject, evidence: Evidence) -> None:
    hidden, token = subject.hidden(MAXIMUM), subject.hidden(9, seed=3)
    alone = Stage(subject.layer(), tokens=2 * MAXIMUM)
    long, short, first = alone.start(), alone.start(), alone.start()
    goal = alone.run(long, hidden, [8 * CHUNK] * 7)
    alone.run(short, token[:7])
    short_goal, first_goal = alone.run(short, token[7:8]), alone.run(first, token[8:])
    stage = Stage(subject.layer(), tokens=2 * MAXIMUM)
    decode, fresh, piece = stage.start(), stage.start(), stage.start()
    stage.run(decode, token[:7])
    outputs = stage.step([(decode, token[7:8]), (fresh, token[8:]), (piece, hidden)])
    evidence.close("the output of the long piece", outputs[2], goal, subject.limit, rows="token")
    evidence.close("the decode beside it", outputs[0], short_goal, subject.limit)
    evidence.close("the one-token prompt beside it", outputs[1], first_goal, subject.limit)
    for name, field in stage.state(piece).items():
        evidence.close(f"state '{name}'", field, alone.state(long)[name], subject.limit)


def _random_cuts(tokens: int) -> list[tuple[str, list[int]]]:
    cuts = []
    for seed in range(3):
        chosen = random.Random(seed)
        ends = sorted(chosen.sample(range(1, tokens), 6))
        sizes = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
        cuts.append((", ".join(map(str, sizes)) + " and the rest", sizes))
    return cuts
