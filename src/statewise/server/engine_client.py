"""The engine's process as the HTTP process sees it: started, asked, watched, started again."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from statewise.engine.sampling_params import SamplingParams
from statewise.errors import RequestError, StatewiseError
from statewise.server import messages
from statewise.server.channel import ChannelError, Link
from statewise.server.errors import ApiError
from statewise.server.inbox import Inbox, Stream
from statewise.server.metrics_tally import Seen, carried
from statewise.server.private_directory import PrivateDirectory

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer", bound=msgspec.Struct)
Phase = Literal["loading", "ready", "dead", "closed"]
STALE_S = 30.0  # without a heartbeat the step loop counts as stuck: the longest step is a whole prefill


class EngineDead(StatewiseError):
    """The engine has ended, or was never there."""


class EngineClient:
    """Starts an engine process and talks to it. All methods belong to one event loop."""

    program = "statewise.server.engine_process"  # the module that is run

    def __init__(self, model: str, arguments: dict[str, Any], *, restart: bool = False, log_json: bool = False) -> None:
        self.model = model
        self.info: messages.Loaded | None = None
        self.stats: messages.Stats | None = None
        self.phase: Phase = "loading"
        self.failure: str | None = None  # why the model cannot be served
        self.restarts = 0
        self.loading: messages.Loading | None = None
        self.seen = Seen()
        self.past: messages.Stats | None = None  # what the engines before this one have counted
        self._arguments, self._restart, self._log_json = arguments, restart, log_json
        self._home = PrivateDirectory()
        self._numbers = itertools.count(1)
        self._streams: dict[int, Stream] = {}
        self._questions: dict[int, asyncio.Future[Any]] = {}
        self._link: Link | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._beat = time.monotonic()
        self._changed = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None

    @property
    def directory(self) -> Path:
        """A private directory that both processes see."""
        return self._home.path

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
        """Let the engine finish its writing and end it; one that has not loaded yet, or takes too long, is killed."""
        loading = self.phase == "loading"
        self._set("closed")
        if not loading:
            self._tell(messages.Close())
        if self._process is not None and self._process.returncode is None:
            try:
                await asyncio.wait_for(self._process.wait(), 0 if loading else patience_s)
            except TimeoutError:
                self.kill()
                await self._process.wait()
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
        self._fail_all(EngineDead("the server is shutting down"))
        self._home.remove()

    def kill(self) -> None:
        """End the engine at once, whatever it is doing."""
        self._set("closed")
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def _watch(self) -> None:
        """Run the process, and again if that is wanted, as long as it was ready before it ended."""
        while True:
            try:
                await self._run()
            except OSError as error:
                self.failure = f"the engine process cannot be started: {error.strerror or error}"
                logger.error("%s", self.failure)
            was_ready = self.phase == "ready"
            self.past, self.stats = carried(self.past, self.stats), None  # so that no counter goes back
            self._link = None
            if self.phase == "closed":
                return
            self._set("loading" if self._restart and was_ready else "dead")
            self._fail_all(EngineDead("the engine has ended"))
            if self.phase == "dead":
                return
            self.restarts += 1

    async def _run(self) -> None:
        """One life of the process."""
        path = self._home.path / f"engine-{self.restarts}.socket"
        arrived: asyncio.Future[Link] = asyncio.Future()

        def accept() -> Link:
            link = Link(messages.FromEngine, self._take)
            if arrived.done():
                link.close()
            else:
                arrived.set_result(link)
            return link

        server = await asyncio.get_running_loop().create_unix_server(accept, path)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", self.program, str(path), *["--log-json"] * self._log_json]
        self._process = await asyncio.create_subprocess_exec(*command, env=environment)
        ended = asyncio.create_task(self._process.wait())
        waited: set[asyncio.Future[Any]] = {ended, arrived}
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if not arrived.done():
                self.failure = "the engine process ended before it had begun; its log says why"
                return
            self._link = arrived.result()
            self._tell(messages.Load(self.model, self._arguments))
            await self._link.lost
        finally:
            server.close()
            if self._link is not None:
                self._link.close()
            with contextlib.suppress(ProcessLookupError):
                if self.phase != "closed" and self._process.returncode is None:
                    self._process.kill()
            await ended

    # What the engine says

    def _take(self, message: Any) -> None:
        self._beat = time.monotonic()
        match message:
            case messages.Step():
                self._distribute(message)
            case messages.Finished():
                self.seen.finished(message)
                if stream := self._streams.pop(message.id, None):
                    stream.finish(message)
            case messages.Stats():
                self.stats = message
            case messages.Loading():
                self.loading = message
            case messages.Loaded():
                self.info = message
                if self.phase == "loading":
                    self._set("ready")
            case messages.LoadFailed():
                self.failure = message.message
            case messages.Refused():
                self._refuse(message)
            case _:
                if (question := self._questions.pop(message.id, None)) and not question.done():
                    question.set_result(message)

    def _distribute(self, step: messages.Step) -> None:
        at = step.at
        counts: dict[float, int] = {}  # pieces by when their stream had its last ones: mostly at one time, all of them
        for piece in step.pieces:
            stream = self._streams.get(piece.id)
            if stream is None:
                continue
            if stream.last_piece != at:
                stream.before, stream.last_piece = stream.last_piece, at
            counts[stream.before] = counts.get(stream.before, 0) + 1
            piece.index += stream.first_choice
            if not stream.inbox.put(piece):
                stream.close()
        self.seen.took(at, counts)

    def _refuse(self, message: messages.Refused) -> None:
        error: Exception = RequestError(message.field, message.message)
        if message.field == messages.STORAGE:
            logger.error("a session could not be exported: %s", message.message)
            error = ApiError.no_storage()
        if message.field == messages.BUSY:
            error = ApiError.overloaded()
        if stream := self._streams.pop(message.id, None):
            stream.inbox.fail(error)
        if (question := self._questions.pop(message.id, None)) and not question.done():
            question.set_exception(error)
        self.seen.refused_files += message.field == "file"

    def fail_streams(self, error: Exception) -> None:
        """End all requests with an error."""
        for stream in list(self._streams.values()):
            stream.inbox.fail(error)
            stream.close()

    def _fail_all(self, error: EngineDead) -> None:
        """End all that waits for the engine, which has gone."""
        for stream in self._streams.values():
            stream.inbox.fail(error)
        self.seen.ended["error"] += len(self._streams)
        self._streams.clear()
        for question in self._questions.values():
            if not question.done():
                question.set_exception(error)
        self._questions.clear()

    def _set(self, phase: Phase) -> None:
        self.phase = phase
        self._changed.set()

    # Requests

    def generate(self, token_ids: list[int], params: SamplingParams, inbox: Inbox, first_choice: int = 0) -> Stream:
        """Queue a prompt, whose pieces go to `inbox`. Raises `EngineDead`."""
        number = next(self._numbers)
        self._send(messages.Generate(number, token_ids, params))
        stream = self._streams[number] = Stream(number, inbox, first_choice, self._abort)
        inbox.begin()
        self.seen.choices.add(params.n)
        self.seen.max_tokens.add(params.max_tokens)
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
        if self._streams.pop(number, None) is not None:
            self._tell(messages.Abort([number]))

    def _send(self, message: msgspec.Struct) -> None:
        """Raises `EngineDead`."""
        if not self._tell(message):
            raise EngineDead(self.failure or "the engine is not there")

    def _tell(self, message: msgspec.Struct) -> bool:
        """False: nobody is there to hear it."""
        try:
            if self._link is not None:
                self._link.send(message)
                return True
        except ChannelError:
            pass
        return False
