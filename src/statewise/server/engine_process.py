"""The engine in a process of its own: commands in, what each step gave out.

    python -m statewise.server.engine_process SOCKET [--log-json]

It ends when the other side does, so nothing is left behind whichever process dies.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from statewise.api.llm import LLM
from statewise.engine.grammar import CompiledStructure
from statewise.engine.request import Request
from statewise.errors import RequestError, SnapshotError, StatewiseError
from statewise.memory.snapshot_transcript import decode_transcript, encode_transcript
from statewise.models.weights import Progress
from statewise.server import logs, messages
from statewise.server.channel import BlockingReader, ChannelError, Invalid, Outbox
from statewise.server.engine_figures import EngineFigures, loaded

logger = logging.getLogger(__name__)
BEAT_S = 0.5  # between two heartbeats
MAX_PREPARING = 16  # requests that wait for their structure: each can take a few seconds of one thread
LOADING_S = 0.2  # between two words about how far the loading is
GONE = object()  # the other side


@dataclass(frozen=True)
class Prepared:
    """A request whose structure is compiled, or why it is not."""

    message: messages.Generate
    result: CompiledStructure | Exception

    @property
    def id(self) -> int:
        return self.message.id


class EngineProcess:
    """One engine, driven by the messages of one connection."""

    def __init__(self, llm: LLM, inbox: queue.SimpleQueue[Any], outbox: Outbox) -> None:
        self.llm = llm
        self.engine = llm.engine
        self._inbox, self._outbox = inbox, outbox
        self._live: dict[int, Request] = {}
        self._preparing: dict[int, Future[None]] = {}  # requests whose structure is being compiled
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._compiler.submit(self.engine.grammars.warm_up)
        self._sent: dict[tuple[int, int], int] = {}  # log-probabilities sent of each continuation
        self._figures = EngineFigures(self.engine)
        self._beat = 0.0

    def run(self) -> None:
        """Serve until told to close, or until nobody is there."""
        while True:
            idle = not self.engine.has_work
            try:
                message = self._inbox.get(timeout=BEAT_S) if idle else self._inbox.get_nowait()
                while True:
                    if message is GONE or isinstance(message, messages.Close):
                        self._compiler.shutdown(wait=False, cancel_futures=True)
                        return
                    self._take(message)
                    message = self._inbox.get_nowait()
            except queue.Empty:
                pass
            if self.engine.has_work:
                begin, computed = time.perf_counter(), self.engine.computed_tokens
                self.engine.step()
                self._figures.stepped(time.perf_counter() - begin, self.engine.computed_tokens - computed)
                self._give()
            if time.monotonic() - self._beat > BEAT_S:
                self._outbox.put(self._figures.stats(self._live.values(), len(self._preparing)))
                self._beat = time.monotonic()

    # Commands

    def _take(self, message: Any) -> None:
        try:
            if isinstance(message, Invalid):
                raise message.error
            if isinstance(message, messages.Generate):
                self._generate(message)
            elif isinstance(message, Prepared):
                self._begin(message)
            elif isinstance(message, messages.Abort):
                for number in message.ids:
                    if number in self._live:
                        self.engine.abort(self._live[number])
                    elif number in self._preparing:
                        self._preparing.pop(number).cancel()
                self._give()
            else:
                self._outbox.put(self._answer(message))
        except RequestError as error:
            self._outbox.put(messages.Refused(message.id, error.field, str(error)))
        except SnapshotError as error:
            field = messages.STORAGE if isinstance(message, messages.Export) else "file"
            self._outbox.put(messages.Refused(message.id, field, str(error)))

    def _generate(self, message: messages.Generate) -> None:
        """Queue a prompt, or have its structure compiled first."""
        structure = message.params.structure
        kept = None if structure is None else self.engine.grammars.kept(structure)
        if structure is None or kept is not None:
            self._live[message.id] = self.engine.add(None, message.token_ids, message.params, structure=kept)
        elif len(self._preparing) >= MAX_PREPARING:
            self._outbox.put(messages.Refused(message.id, messages.BUSY, "too many structures are being compiled"))
        else:
            self._preparing[message.id] = self._compiler.submit(self._compile, message)

    def _compile(self, message: messages.Generate) -> None:
        """Compile a structure beside the step loop, which hears of it by its inbox."""
        structure = message.params.structure
        assert structure is not None
        try:
            result: CompiledStructure | Exception = self.engine.grammars.compile(structure)
        except Exception as error:
            result = error
        self._inbox.put(Prepared(message, result))

    def _begin(self, prepared: Prepared) -> None:
        """Queue a prompt whose structure is compiled, unless its client has left."""
        message, result = prepared.message, prepared.result
        if self._preparing.pop(message.id, None) is None:
            return
        if isinstance(result, RequestError):
            self._outbox.put(messages.Refused(message.id, result.field, str(result)))
        elif isinstance(result, Exception):
            logger.error("a structure could not be compiled", exc_info=result)
            self._outbox.put(messages.Refused(message.id, "structure", "the structure cannot be compiled; change it"))
        else:
            self._live[message.id] = self.engine.add(None, message.token_ids, message.params, structure=result)

    def _answer(self, message: Any) -> msgspec.Struct:
        match message:
            case messages.Frozen():
                points = self.engine.frozen(message.salt, message.token_ids)
                runner = self.engine.runner
                return messages.Points(message.id, points, runner.records.spec.nbytes, runner.pages.spec.nbytes)
            case messages.Pin():
                self.engine.pin(message.salt, message.token_ids, time.monotonic() + message.seconds)
                return messages.Done(message.id)
            case messages.Export():
                checkpoint, hidden = self.engine.export(message.salt, message.token_ids)
                transcript = decode_transcript(message.transcript, len(message.token_ids))
                self.llm.write_session(Path(message.path), message.token_ids, transcript, checkpoint, hidden)
                return messages.Done(message.id)
            case messages.Import():
                session = self.llm.load_session(message.path, message.salt)
                tokens = session.token_ids
                return messages.Taken(message.id, tokens, encode_transcript(session.transcript, len(tokens)))
        raise RequestError("message", f"{type(message).__name__} is not understood")

    # Results

    def _give(self) -> None:
        """Send what the requests have got since the last time."""
        pieces: list[messages.Piece] = []
        ended: list[messages.Finished] = []
        for number, request in list(self._live.items()):
            choosing = request.params.copies > request.params.n
            while request.deltas:
                delta = request.deltas.popleft()
                if not choosing:
                    pieces.append(self._piece(number, request, delta))
            if request.finished:
                ended.append(self._finished(number, request, choosing))
        if pieces or ended:
            self._outbox.put(*[messages.Step(pieces)] * bool(pieces), *ended)

    def _piece(self, number: int, request: Request, delta: Any) -> messages.Piece:
        completion = request.sequences[delta.index].completion
        logprobs = None
        if completion.logprobs is not None:
            sent = self._sent.get((number, delta.index), 0)
            logprobs = completion.logprobs[sent : sent + len(delta.token_ids)]
            self._sent[number, delta.index] = sent + len(logprobs)
        stop_reason = completion.stop_reason if delta.finish_reason else None
        return messages.Piece(
            number, delta.index, delta.text, delta.token_ids, delta.finish_reason, stop_reason, logprobs
        )

    def _finished(self, number: int, request: Request, choosing: bool) -> messages.Finished:
        del self._live[number]
        for index in range(len(request.sequences)):
            self._sent.pop((number, index), None)
        self._figures.ended(request)
        choices = None
        if choosing:
            choices = [
                messages.Choice(one.text, one.token_ids, one.finish_reason, one.stop_reason, one.logprobs)
                for one in request.output().outputs
            ]
        reasons = [one.completion.finish_reason or "abort" for one in request.sequences]
        return messages.Finished(
            number, request.metrics, request.prompt_logprobs, request.error, choices, reasons, request.error_field
        )


def _progress(outbox: Outbox) -> Progress:
    """Tells the other side of the weights that are loaded, a few times a second."""
    told = 0.0

    def tell(done: int, total: int) -> None:
        nonlocal told
        if done == total or time.monotonic() - told > LOADING_S:
            told = time.monotonic()
            outbox.put(messages.Loading(done, total))

    return tell


def _read(reader: BlockingReader, inbox: queue.SimpleQueue[Any], loaded: threading.Event) -> None:
    try:
        while True:
            inbox.put(reader.read())
    except ChannelError:
        if not loaded.is_set():
            os._exit(1)  # loading can take minutes, and nobody waits for the model any more
        inbox.put(GONE)
    except BaseException:  # without a reader the engine would live and hear nothing
        inbox.put(GONE)
        raise


def main(path: str) -> None:
    """Connect, load, serve."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the other process decides when this one ends
        signal.signal(number, signal.SIG_IGN)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    reader = BlockingReader(connection, messages.ToEngine)
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    outbox = Outbox(connection)
    try:
        load = reader.read()
    except ChannelError:
        return
    ready = threading.Event()
    threading.Thread(target=_read, args=(reader, inbox, ready), daemon=True).start()
    try:
        llm = LLM(load.model, progress=_progress(outbox), **load.arguments)
    except StatewiseError as error:
        outbox.put(messages.LoadFailed(str(error)))
    else:
        ready.set()
        outbox.put(loaded(llm))
        try:
            EngineProcess(llm, inbox, outbox).run()
        finally:
            llm.close()
    outbox.close()


if __name__ == "__main__":
    logs.configure("--log-json" in sys.argv[2:], "engine")
    logging.getLogger("statewise.api.selection").setLevel(logging.WARNING)  # the other process says it
    main(sys.argv[1])
