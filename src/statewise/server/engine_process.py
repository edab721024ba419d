"""The engine in a process of its own: commands in, what each step gave out.

    python -m statewise.server.engine_process SOCKET

It ends when the other side does, so nothing is left behind whichever process dies.
"""

from __future__ import annotations

import logging
import queue
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec

from statewise.api.llm import LLM
from statewise.engine.request import Request
from statewise.errors import RequestError, SnapshotError, StatewiseError
from statewise.memory.snapshot_transcript import decode_transcript, encode_transcript
from statewise.server import messages
from statewise.server.channel import BlockingReader, ChannelError, Encoder

logger = logging.getLogger(__name__)
BEAT_S = 0.5  # between two heartbeats
GONE = object()  # the other side


class EngineProcess:
    """One engine, driven by the messages of one connection."""

    def __init__(self, llm: LLM, inbox: queue.SimpleQueue[Any], outbox: queue.SimpleQueue[Any]) -> None:
        self.llm = llm
        self.engine = llm.engine
        self._inbox, self._outbox = inbox, outbox
        self._live: dict[int, Request] = {}
        self._sent: dict[tuple[int, int], int] = {}  # log-probabilities sent of each continuation
        self._steps, self._step_seconds, self._beat = 0, 0.0, 0.0
        self._totals = {"prompt": 0, "cached": 0, "generated": 0, "preempted": 0}

    def run(self) -> None:
        """Serve until told to close, or until nobody is there."""
        while True:
            idle = not self.engine.has_work
            try:
                message = self._inbox.get(timeout=BEAT_S) if idle else self._inbox.get_nowait()
                while True:
                    if message is GONE or isinstance(message, messages.Close):
                        return
                    self._take(message)
                    message = self._inbox.get_nowait()
            except queue.Empty:
                pass
            if self.engine.has_work:
                begin = time.perf_counter()
                self.engine.step()
                self._steps += 1
                self._step_seconds += time.perf_counter() - begin
                self._give()
            if time.monotonic() - self._beat > BEAT_S:
                self._outbox.put(self._stats())
                self._beat = time.monotonic()

    # Commands

    def _take(self, message: Any) -> None:
        try:
            if isinstance(message, messages.Generate):
                self._live[message.id] = self.engine.add(None, message.token_ids, message.params)
            elif isinstance(message, messages.Abort):
                for number in message.ids:
                    if number in self._live:
                        self.engine.abort(self._live[number])
                self._give()
            else:
                self._outbox.put(self._answer(message))
        except RequestError as error:
            self._outbox.put(messages.Refused(message.id, error.field, str(error)))
        except SnapshotError as error:
            self._outbox.put(messages.Refused(message.id, "file", str(error)))

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
        if pieces:
            self._outbox.put(messages.Step(pieces))
        for message in ended:
            self._outbox.put(message)

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
        metrics = request.metrics
        self._totals["prompt"] += metrics.prompt_tokens
        self._totals["cached"] += metrics.cached_tokens
        self._totals["generated"] += metrics.completion_tokens
        self._totals["preempted"] += metrics.preemptions
        choices = None
        if choosing:
            choices = [
                messages.Choice(one.text, one.token_ids, one.finish_reason, one.stop_reason, one.logprobs)
                for one in request.output().outputs
            ]
        return messages.Finished(number, metrics, request.prompt_logprobs, request.error, choices)

    def _stats(self) -> messages.Stats:
        scheduler, cache = self.engine.scheduler, self.engine.scheduler.cache
        checkpoints, counts, disk_bytes = {"device": len(cache.device.held)}, dict(vars(cache.counts)), 0
        if cache.depot is not None:
            checkpoints["host"] = len(cache.depot.host.held)
            counts |= vars(cache.depot.counts)
            if cache.depot.disk is not None:
                checkpoints["disk"] = len(cache.depot.disk.held)
                disk_bytes = cache.depot.disk.used_bytes
        records, pages = self.engine.runner.records, self.engine.runner.pages
        return messages.Stats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting) + len(scheduler.suspects),
            steps=self._steps,
            step_seconds=self._step_seconds,
            prompt_tokens=self._totals["prompt"],
            cached_tokens=self._totals["cached"],
            generated_tokens=self._totals["generated"],
            preemptions=self._totals["preempted"],
            records_used=records.num_blocks - records.num_free,
            pages_used=pages.num_blocks - pages.num_free,
            checkpoints=checkpoints,
            disk_bytes=disk_bytes,
            counts=counts,
        )


def loaded(llm: LLM) -> messages.Loaded:
    config, runner = llm.engine.config, llm.engine.runner
    return messages.Loaded(
        max_length=config.max_length,
        vocab_size=llm.engine.vocab_size,
        num_records=config.num_records,
        num_pages=config.num_pages,
        record_bytes=runner.records.spec.nbytes,
        page_bytes=runner.pages.spec.nbytes,
        page_size=config.page_size,
        summary=msgspec.to_builtins(llm.summary(), enc_hook=str),
    )


def _read(reader: BlockingReader, inbox: queue.SimpleQueue[Any]) -> None:
    try:
        while True:
            inbox.put(reader.read())
    except ChannelError:
        inbox.put(GONE)


def _write(connection: socket.socket, outbox: queue.SimpleQueue[Any]) -> None:
    encoder = Encoder()
    try:
        while (message := outbox.get()) is not None:
            connection.sendall(encoder.frame(message))
    except OSError:
        pass  # the reader notices too


def main(path: str) -> None:
    """Connect, load, serve."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the other process decides when this one ends
        signal.signal(number, signal.SIG_IGN)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    reader = BlockingReader(connection, messages.ToEngine)
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    writer = threading.Thread(target=_write, args=(connection, outbox), daemon=True)
    writer.start()
    try:
        load = reader.read()
    except ChannelError:
        return
    threading.Thread(target=_read, args=(reader, inbox), daemon=True).start()
    try:
        llm = LLM(load.model, **load.arguments)
    except StatewiseError as error:
        outbox.put(messages.LoadFailed(str(error)))
    else:
        outbox.put(loaded(llm))
        try:
            EngineProcess(llm, inbox, outbox).run()
        finally:
            llm.close()
    outbox.put(None)
    writer.join(timeout=10)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s engine %(message)s")
    main(sys.argv[1])
