"""Forms in the engine's process: compiled beside the step loop, refused there, and given up with their requests."""

from __future__ import annotations

import queue
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from statewise import LLM, SamplingParams, Structure
from statewise.server import messages
from statewise.server.engine_process import EngineProcess


class Told(list[Any]):
    def put(self, *said: Any) -> None:
        self.extend(said)


class Driven:
    """An `EngineProcess` without its sockets."""

    def __init__(self, offline: LLM) -> None:
        self.told = Told()
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.process = EngineProcess(offline, self.inbox, self.told)  # type: ignore[arg-type]

    def run_until(self, wanted: Callable[[list[Any]], bool]) -> list[Any]:
        deadline = time.monotonic() + 60
        while not wanted(self.told):
            assert time.monotonic() < deadline
            working = self.process.engine.has_work
            with suppress(queue.Empty):
                self.process._take(self.inbox.get(timeout=0 if working else 1))
            if self.process.engine.has_work:
                self.process.engine.step()
                self.process._give()
        return self.told


def test_the_step_loop_goes_on_while_a_form_is_compiled_and_its_client_may_leave(
    offline: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    driven, go_on = Driven(offline), threading.Event()
    compiled = offline.engine.grammars.compile
    monkeypatch.setattr(offline.engine.grammars, "compile", lambda form: go_on.wait(60) and compiled(form))
    prompt = [5, 6, 7]
    plain = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    driven.inbox.put(messages.Generate(1, prompt, SamplingParams(structure=Structure.regex("b" + "{2}" * 21))))
    driven.inbox.put(messages.Generate(2, prompt, SamplingParams(structure=Structure.regex("[x-z]{3}"))))
    driven.inbox.put(messages.Generate(3, prompt, plain))
    driven.inbox.put(messages.Generate(4, prompt, SamplingParams(structure=Structure.regex("[u-w]{3}"))))
    driven.inbox.put(messages.Abort([4]))
    driven.run_until(lambda told: any(isinstance(one, messages.Finished) for one in told))
    assert driven.process._preparing.keys() == {1, 2}
    go_on.set()
    told = driven.run_until(lambda told: {1, 2, 3} <= {getattr(one, "id", 0) for one in told})
    ended = [one.id for one in told if isinstance(one, messages.Finished | messages.Refused)]
    assert ended[0] == 3
    refused = next(one for one in told if isinstance(one, messages.Refused))
    assert refused.id == 1
    assert 4 not in ended
    text = "".join(
        piece.text for one in told if isinstance(one, messages.Step) for piece in one.pieces if piece.id == 2
    )
    assert re.fullmatch("[x-z]{3}", text)
    assert not driven.process._preparing


def test_a_request_that_is_refused_behind_its_form_touches_no_other(offline: LLM) -> None:
    driven = Driven(offline)
    form = Structure.regex("[x-z]{3}")
    outside = SamplingParams(structure=form, logit_bias={1_000_000: 1.0})
    driven.inbox.put(messages.Generate(1, [5, 6, 7], outside))
    driven.inbox.put(messages.Generate(2, [5, 6, 7], SamplingParams(structure=form)))
    told = driven.run_until(lambda told: {1, 2} <= {getattr(one, "id", 0) for one in told})
    refused = next(one for one in told if isinstance(one, messages.Refused))
    assert (refused.id, refused.field) == (1, "logit_bias")
    assert next(one for one in told if isinstance(one, messages.Finished)).error is None


def test_closing_does_not_wait_for_forms_that_nobody_needs_any_more(offline: LLM) -> None:
    driven = Driven(offline)
    for number in range(4):
        form = Structure.regex("c" + "{2}" * (20 + number))
        driven.inbox.put(messages.Generate(number, [5, 6, 7], SamplingParams(structure=form)))
    driven.inbox.put(messages.Close())
    driven.process.run()
    assert driven.process._preparing[3].cancelled()
