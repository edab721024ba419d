"""Work with a time limit: it ends, its thread is free again, and no other work feels it."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from statewise.errors import RequestError
from statewise.server.bounded import BoundedWork
from statewise.server.text import TextSide
from tests.server.scripted import tokenizer_with

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def forever() -> None:
    while True:
        pass


def test_an_endless_loop_ends_and_frees_its_thread() -> None:
    async def go() -> None:
        work = BoundedWork(0.2, threads=1)
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await work.run(forever)
        work = BoundedWork(30, threads=1)
        assert await work.run(lambda: 5) == 5

    before = time.monotonic()
    asyncio.run(go())
    assert time.monotonic() - before < 30
    deadline = time.monotonic() + 30
    while any("text" in thread.name and thread.is_alive() for thread in threading.enumerate()):
        stuck = [thread for thread in threading.enumerate() if "text" in thread.name]
        if all(not _runs_forever(thread) for thread in stuck):
            break
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _runs_forever(thread: threading.Thread) -> bool:
    import sys

    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        if frame.f_code is forever.__code__:
            return True
        frame = frame.f_back
    return False


def test_work_that_ends_just_in_time_or_just_too_late_hurts_nobody() -> None:
    async def go() -> None:
        work = BoundedWork(0.01, threads=2)

        async def one(seconds: float) -> int:
            try:
                return await work.run(lambda: time.sleep(seconds) or 1)
            except TimeoutError:
                return 0

        for _ in range(10):
            ended = await asyncio.gather(*(one(0.002 * index) for index in range(10)))
            assert ended[0] in (0, 1)
        await asyncio.sleep(0.3)
        assert await BoundedWork(30).run(lambda: 7) == 7

    asyncio.run(go())


def test_what_the_work_raises_reaches_the_caller() -> None:
    def fail() -> None:
        raise KeyError("x")

    async def go() -> None:
        await BoundedWork(30).run(fail)

    with pytest.raises(KeyError):
        asyncio.run(go())


def test_a_template_that_never_ends_is_refused_and_others_are_rendered() -> None:
    async def go() -> None:
        text = TextSide(tokenizer_with(ENDLESS), lambda: 4096, 0.3)
        for _ in range(6):  # more than there are threads
            with pytest.raises(RequestError, match="took more than"):
                await text.encode_chat([{"role": "user", "content": "x"}])
        patient = TextSide(tokenizer_with(), lambda: 4096, 30)
        assert await patient.encode("hello")

    asyncio.run(go())
