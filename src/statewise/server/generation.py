"""Prompts on their way through the engine, as one answer with numbered choices."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from starlette.requests import ClientDisconnect, Request

from statewise.engine.sampling_params import SamplingParams
from statewise.errors import RequestError, StatewiseError
from statewise.server import messages
from statewise.server.engine_client import EngineClient
from statewise.server.inbox import Inbox, Stream

if TYPE_CHECKING:
    from statewise.server.session_turn import Turn

Result = TypeVar("Result")


class ClientGone(ClientDisconnect):
    """Nobody waits for the answer any more."""


class Generation:
    """All prompts of one HTTP request. Choice `c` is continuation `c % n` of prompt `c // n`."""

    def __init__(self, engine: EngineClient, prompts: Sequence[list[int]], params: SamplingParams) -> None:
        """Queue all prompts. Raises `EngineDead`."""
        self.params = params
        self.prompts = prompts
        self.turn: Turn | None = None  # of a session, which takes the answer
        self._inbox = Inbox()
        self._streams: list[Stream] = []
        try:
            for number, prompt in enumerate(prompts):
                self._streams.append(engine.generate(prompt, params, self._inbox, number * params.n))
        except StatewiseError:
            self.close()
            raise

    @property
    def finished(self) -> list[messages.Finished]:
        """What each prompt ended with; complete when `batches` has ended."""
        return [stream.finished for stream in self._streams if stream.finished is not None]

    async def batches(self) -> AsyncIterator[list[messages.Piece]]:
        """The pieces that are there, with the numbers of their choices as `index`, then those that have come meanwhile.

        There are several of one choice in a batch when the engine was quicker than the client. Raises `RequestError`
        for a prompt that is refused or has failed by its own fault, `StatewiseError` for one that has failed otherwise,
        `EngineDead`; all prompts are ended then, and also when the iterator is closed early.
        """
        try:
            while pieces := await self._inbox.fetch():
                if self.turn is not None:
                    for piece in pieces:
                        self.turn.take(piece.token_ids, piece.text)
                yield pieces
            for finished in self.finished:
                if finished.error is not None:
                    field = finished.error_field
                    raise RequestError(field, finished.error) if field else StatewiseError(finished.error)
        finally:
            self.close()

    async def complete(self) -> list[messages.Choice]:
        """All choices, when all have ended. Raises as `batches`."""
        count = len(self._streams) * self.params.n
        choices = [messages.Choice("", [], None, None, None) for _ in range(count)]
        async for pieces in self.batches():
            for piece in pieces:
                choice = choices[piece.index]
                choice.text += piece.text
                choice.token_ids += piece.token_ids
                if piece.logprobs is not None:
                    choice.logprobs = choice.logprobs or []
                    choice.logprobs += piece.logprobs
                if piece.finish_reason is not None:
                    choice.finish_reason, choice.stop_reason = piece.finish_reason, piece.stop_reason
        for number, finished in enumerate(self.finished):
            if finished.choices is not None:
                choices[number * self.params.n : (number + 1) * self.params.n] = finished.choices
        return choices

    def close(self) -> None:
        """End what is not finished."""
        for stream in self._streams:
            stream.close()


async def unless_gone(request: Request, work: asyncio.Task[Result]) -> Result:
    """The result of `work`, which is cancelled when the client leaves. Raises `ClientGone`."""

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    leaving = asyncio.create_task(leave())
    try:
        await asyncio.wait([work, leaving], return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise ClientGone
    finally:
        for task in (work, leaving):
            if not task.done():
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task
