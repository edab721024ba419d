"""Prompts on their way through the engine, as one answer with numbered choices."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from starlette.requests import Request

from statewise.engine.sampling_params import SamplingParams
from statewise.errors import StatewiseError
from statewise.server import messages
from statewise.server.engine_client import EngineClient, Stream

if TYPE_CHECKING:
    from statewise.server.sessions import Turn

Result = TypeVar("Result")


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Generation:
    """All prompts of one HTTP request. Choice `c` is continuation `c % n` of prompt `c // n`."""

    def __init__(self, engine: EngineClient, prompts: Sequence[list[int]], params: SamplingParams) -> None:
        """Queue all prompts. Raises `EngineDead`."""
        self.params = params
        self.prompts = prompts
        self.turn: Turn | None = None  # of a session, which takes the answer
        self._streams: list[Stream] = []
        try:
            for prompt in prompts:
                self._streams.append(engine.generate(prompt, params))
        except StatewiseError:
            self.close()
            raise

    @property
    def finished(self) -> list[messages.Finished]:
        """What each prompt ended with; complete when `pieces` has ended."""
        return [stream.finished for stream in self._streams if stream.finished is not None]

    async def pieces(self) -> AsyncIterator[list[messages.Piece]]:
        """The pieces of each step with the numbers of their choices as `index`.

        Raises `RequestError` for a prompt that is refused, `EngineDead`; all prompts are ended then, and also when the
        iterator is closed early.
        """
        try:
            source = self._streams[0].__aiter__() if len(self._streams) == 1 else self._merged()
            async for pieces in source:
                if self.turn is not None:
                    for piece in pieces:
                        self.turn.take(piece.token_ids, piece.text)
                yield pieces
        finally:
            self.close()

    async def _merged(self) -> AsyncIterator[list[messages.Piece]]:
        merged: asyncio.Queue[list[messages.Piece] | BaseException | None] = asyncio.Queue()

        async def forward(number: int, stream: Stream) -> None:
            try:
                async for pieces in stream:
                    for piece in pieces:
                        piece.index += number * self.params.n
                    merged.put_nowait(pieces)
                merged.put_nowait(None)
            except Exception as error:
                merged.put_nowait(error)

        tasks = [asyncio.create_task(forward(number, stream)) for number, stream in enumerate(self._streams)]
        try:
            left = len(tasks)
            while left:
                item = await merged.get()
                if item is None:
                    left -= 1
                elif isinstance(item, BaseException):
                    raise item
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def complete(self) -> list[messages.Choice]:
        """All choices, when all have ended. Raises as `pieces`, and `StatewiseError` where a request failed."""
        count = len(self._streams) * self.params.n
        choices = [messages.Choice("", [], None, None, None) for _ in range(count)]
        async for pieces in self.pieces():
            for piece in pieces:
                choice = choices[piece.index]
                choice.text += piece.text
                choice.token_ids += piece.token_ids
                if piece.logprobs is not None:
                    choice.logprobs = [*(choice.logprobs or []), *piece.logprobs]
                if piece.finish_reason is not None:
                    choice.finish_reason, choice.stop_reason = piece.finish_reason, piece.stop_reason
        for number, finished in enumerate(self.finished):
            if finished.error is not None:
                raise StatewiseError(finished.error)
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
