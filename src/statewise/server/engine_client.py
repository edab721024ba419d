"""The engine's process as the HTTP process sees it: started, asked, watched, started again."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from statewise.engine.sampling_params import SamplingParams
from statewise.errors import RequestError, StatewiseError
from statewise.server import messages
from statewise.server.channel import AsyncReader, ChannelError, Encoder

Answer = TypeVar("Answer", bound=msgspec.Struct)
Phase = Literal["loading", "ready", "dead", "closed"]
STALE_S = 30.0  # without a heartbeat the step loop counts as stuck: the longest step is a whole prefill


class EngineDead(StatewiseError):
    """The engine has ended, or was never there."""


class Stream:
    """One request: pieces as they come, then what it ended with. Leaving it early ends the request."""

    def __init__(self, abort: Callable[[int], None]) -> None:
        self.number = 0  # set by the client
        self.finished: messages.Finished | None = None
        self._abort = abort
        self._queue: asyncio.Queue[Any] = asyncio.Queue()

    def put(self, item: Any) -> None:
        self._queue.put_nowait(item)

    async def __aiter__(self) -> AsyncIterator[list[messages.Piece]]:
        """Yield the pieces of each step. Raises `RequestError` for a refused request, `EngineDead`."""
        try:
            while True:
                item = await self._queue.get()
                if isinstance(item, list):
                    yield item
                elif isinstance(item, messages.Finished):
                    self.finished = item
                    return
                else:
                    raise item
        finally:
            self.close()

    def close(self) -> None:
        if self.finished is None:
            self._abort(self.number)


class EngineClient:
    """Starts an engine process and talks to it. All methods belong to one event loop."""

    def __init__(self, model: str, arguments: dict[str, Any], *, restart: bool = False) -> None:
        self.model = model
        self.info: messages.Loaded | None = None
        self.stats: messages.Stats | None = None
        self.phase: Phase = "loading"
        self.failure: str | None = None  # why the model cannot be served
        self.restarts = 0
        self._arguments, self._restart = arguments, restart
        self._home = Path(tempfile.mkdtemp(prefix="statewise-"))  # readable by this user only
        self._numbers = itertools.count(1)
        self._streams: dict[int, Stream] = {}
        self._questions: dict[int, asyncio.Future[Any]] = {}
        self._encoder = Encoder()
        self._writer: asyncio.StreamWriter | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._beat = time.monotonic()
        self._changed = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None

    @property
    def directory(self) -> Path:
        """A private directory that both processes see."""
        return self._home

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def beating(self) -> bool:
        """Whether the model is loaded and the step loop gives signs of life."""
        return self.phase == "ready" and time.monotonic() - self._beat < STALE_S

    @property
    def streams(self) -> int:
        return len(self._streams)

    # Life

    def start(self) -> None:
        self._watcher = asyncio.create_task(self._watch())

    async def wait_until_ready(self) -> None:
        """Return when the model is loaded. Raises `EngineDead` when it will not be."""
        while self.phase == "loading":
            self._changed.clear()
            await self._changed.wait()
        if self.phase != "ready":
            raise EngineDead(self.failure or "the engine has ended")

    async def close(self, patience_s: float = 30.0) -> None:
        """Let the engine finish its writing and end it."""
        self._set("closed")
        if self._writer is not None:
            self._send(messages.Close())
        if self._process is not None and self._process.returncode is None:
            try:
                await asyncio.wait_for(self._process.wait(), patience_s)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
        self._fail_all(EngineDead("the server is shutting down"))
        shutil.rmtree(self._home, ignore_errors=True)

    async def _watch(self) -> None:
        """Run the process, and again if that is wanted, as long as it was ready before it ended."""
        while True:
            was_ready = await self._run()
            self._writer = None
            if self.phase == "closed":
                return
            self._fail_all(EngineDead("the engine has ended"))
            if not (self._restart and was_ready):
                self._set("dead")
                return
            self.restarts += 1
            self._set("loading")

    async def _run(self) -> bool:
        """One life of the process. True: the model was ready."""
        path = self._home / f"engine-{self.restarts}.socket"
        arrived: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Future()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if arrived.done():
                writer.close()
            else:
                arrived.set_result((reader, writer))

        server = await asyncio.start_unix_server(accept, path)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "statewise.server.engine_process", str(path), env=environment
        )
        ended = asyncio.create_task(self._process.wait())
        waited: set[asyncio.Future[Any]] = {ended, arrived}
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if not arrived.done():
                self.failure = "the engine process ended before it had begun; its log says why"
                return False
            reader, self._writer = arrived.result()
            self._send(messages.Load(self.model, self._arguments))
            return await self._listen(AsyncReader(reader, messages.FromEngine))
        finally:
            server.close()
            if self._writer is not None:
                self._writer.close()
            with contextlib.suppress(ProcessLookupError):
                if self.phase != "closed" and self._process.returncode is None:
                    self._process.kill()
            await ended

    async def _listen(self, reader: AsyncReader) -> bool:
        ready = False
        try:
            while True:
                message = await reader.read()
                self._beat = time.monotonic()
                match message:
                    case messages.Step():
                        self._distribute(message.pieces)
                    case messages.Finished():
                        if stream := self._streams.pop(message.id, None):
                            stream.put(message)
                    case messages.Stats():
                        self.stats = message
                    case messages.Loaded():
                        self.info, ready = message, True
                        self._set("ready")
                    case messages.LoadFailed():
                        self.failure = message.message
                    case messages.Refused():
                        self._refuse(message)
                    case _:
                        if (question := self._questions.pop(message.id, None)) and not question.done():
                            question.set_result(message)
        except ChannelError:
            return ready

    def _distribute(self, pieces: list[messages.Piece]) -> None:
        by_request: dict[int, list[messages.Piece]] = {}
        for piece in pieces:
            by_request.setdefault(piece.id, []).append(piece)
        for number, own in by_request.items():
            if stream := self._streams.get(number):
                stream.put(own)

    def _refuse(self, message: messages.Refused) -> None:
        error = RequestError(message.field, message.message)
        if stream := self._streams.pop(message.id, None):
            stream.put(error)
        if (question := self._questions.pop(message.id, None)) and not question.done():
            question.set_exception(error)

    def fail_streams(self, error: EngineDead) -> None:
        """End all requests with an error."""
        for number, stream in list(self._streams.items()):
            stream.put(error)
            self._abort(number)

    def _fail_all(self, error: EngineDead) -> None:
        for stream in self._streams.values():
            stream.put(error)
        self._streams.clear()
        for question in self._questions.values():
            if not question.done():
                question.set_exception(error)
        self._questions.clear()

    def _set(self, phase: Phase) -> None:
        self.phase = phase
        self._changed.set()

    # Requests

    def generate(self, token_ids: list[int], params: SamplingParams) -> Stream:
        """Queue a prompt. Raises `EngineDead`."""
        number = next(self._numbers)
        stream = Stream(self._abort)
        stream.number = number
        self._send(messages.Generate(number, token_ids, params))
        self._streams[number] = stream
        return stream

    async def ask(self, make: Callable[[int], msgspec.Struct], answer: type[Answer]) -> Answer:
        """Send a question and wait for its answer. Raises `RequestError` for a refusal, `EngineDead`."""
        number = next(self._numbers)
        question: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._send(make(number))
        self._questions[number] = question
        try:
            found = await question
        finally:
            self._questions.pop(number, None)
        if not isinstance(found, answer):
            raise EngineDead("the engine gave another answer than the one asked for")
        return found

    def _abort(self, number: int) -> None:
        if self._streams.pop(number, None) is not None and self._writer is not None:
            self._send(messages.Abort([number]))

    def _send(self, message: msgspec.Struct) -> None:
        if self._writer is None or self._writer.is_closing():
            raise EngineDead(self.failure or "the engine is not there")
        self._writer.write(self._encoder.frame(message))
