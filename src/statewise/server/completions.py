"""`POST /v1/completions`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from statewise.api.conversation import Content
from statewise.errors import RequestError
from statewise.server import messages, replies
from statewise.server.generation import Generation
from statewise.server.protocol import CompletionRequest
from statewise.server.replies import ChunkEncoder, json_response, new_id
from statewise.server.service import Service


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue a prompt: text or token ids, or a list of either."""
        if body.suffix:
            raise RequestError("suffix", "suffix is not supported: the model writes forwards only; leave it out")
        turn, copies = None, body.best_of or body.n or 1
        several = isinstance(body.prompt, list) and bool(body.prompt) and not isinstance(body.prompt[0], int)
        service.admit(body.model, len(body.prompt) if several else 1, copies)
        if body.stream and body.echo and body.logprobs is not None:
            raise RequestError("echo", "echo with logprobs cannot be streamed: those of the prompt come with its end")
        if body.session_id is not None:
            turn, tokens = await service.turn(request, body.session_id, copies, _one(body.prompt))
            prompts = [tokens]
        else:
            prompts = await service.text.prompts(body.prompt)
        try:
            wanted = body.logprobs if body.logprobs is not None and body.logprobs >= 0 else None
            params = body.sampling(
                16 if body.max_tokens is None else body.max_tokens,
                service.salt(request, body.cache_salt),
                best_of=body.best_of,
                logprobs=wanted,
                prompt_logprobs=wanted if body.echo else None,
            )
            if body.stream and params.copies > params.n:
                raise RequestError("best_of", "best_of cannot be streamed, its best is known at the end: use n")
            reply = _Reply(service, body, prompts, service.generate(prompts, params))
        except BaseException:
            if turn is not None:
                turn.end()
            raise
        if body.stream:
            return service.stream(request, reply.generation, reply.events(), turn)
        choices = await service.whole(request, reply.generation, turn)
        return json_response(reply.whole(choices))

    return routes


def _one(prompt: str | list[Any]) -> Content | None:
    """What a completion adds to a session."""
    if isinstance(prompt, str) or not prompt or isinstance(prompt[0], int):
        return prompt or None
    raise RequestError("prompt", "a request in a session has one prompt: text or token ids")


class _Reply:
    """One answer, whole or in events."""

    def __init__(
        self, service: Service, body: CompletionRequest, prompts: Sequence[list[int]], generation: Generation
    ) -> None:
        self.service, self.body, self.prompts, self.generation = service, body, prompts, generation
        self._head = {
            "id": new_id("cmpl"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.settings.model_name,
        }

    def whole(self, choices: Sequence[messages.Choice]) -> dict[str, Any]:
        n, finished = self.generation.params.n, self.generation.finished
        listed = []
        for index, choice in enumerate(choices):
            prompt = self.prompts[index // n]
            text, ids = choice.text, choice.token_ids
            entries: list[Any] = list(choice.logprobs or [])
            if self.body.echo:
                text = self._spelled(prompt) + text
                ids = [*prompt, *ids]
                entries = (finished[index // n].prompt_logprobs or []) + entries
            listed.append(self._choice(index, text, choice.finish_reason, choice.stop_reason, ids, entries, 0))
        return {**self._head, "choices": listed, "usage": replies.usage(finished)}

    async def events(self) -> AsyncIterator[bytes]:
        encoder = ChunkEncoder(self._head, _plain, include_usage=self.body.include_usage)
        offsets: Counter[int] = Counter()  # characters before the next text
        n = self.generation.params.n
        if self.body.echo:
            for index in range(n * len(self.prompts)):
                text = self._spelled(self.prompts[index // n])
                offsets[index] = len(text)
                yield encoder.text(index, text)
        async for pieces in self.generation.batches():
            events = []
            for piece in pieces:
                if piece.finish_reason is None and piece.logprobs is None:
                    events.append(encoder.text(piece.index, piece.text))
                    continue
                entries, at = piece.logprobs or [], offsets[piece.index]
                choice = self._choice(
                    piece.index, piece.text, piece.finish_reason, piece.stop_reason, piece.token_ids, entries, at
                )
                events.append(encoder.event(choice))
                offsets[piece.index] = at + len(piece.text)
            yield b"".join(events)
        if self.body.include_usage:
            yield encoder.usage(self.generation.finished)

    def _choice(
        self,
        index: int,
        text: str,
        finish: str | None,
        stop: int | str | None,
        ids: Sequence[int],
        entries: Sequence[Any],
        offset: int,
    ) -> dict[str, Any]:
        logprobs = None
        if self.generation.params.logprobs is not None and entries:
            top = self.generation.params.logprobs
            logprobs = replies.completion_logprobs(entries, ids, self.service.text.token_text, offset, top)
        return {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": replies.finish(finish),
            "stop_reason": stop,
        }

    def _spelled(self, prompt: Sequence[int]) -> str:
        if isinstance(self.body.prompt, str) and self.body.session_id is None:
            return self.body.prompt
        return self.service.text.decode(prompt)


def _plain(index: int, text: str) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": None, "stop_reason": None}
