"""From a chat request, whichever API it came by, to tokens in the engine and a way to read its answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request

from statewise.server.answers import AnswerParser, Message
from statewise.server.dialect import Wish
from statewise.server.generation import Generation
from statewise.server.protocol import ChatSampling
from statewise.server.service import Service
from statewise.server.session_turn import Turn


@dataclass(frozen=True)
class ChatAsk:
    """A chat request that the engine works on."""

    generation: Generation
    turn: Turn | None  # of a session, which takes the answer
    wish: Wish
    new_parser: Callable[[], AnswerParser]  # for one choice

    def one_call(self, answer: Message) -> Message:
        """The answer with no more calls than were asked for."""
        return replace(answer, tool_calls=answer.tool_calls[:1]) if self.wish.one_call else answer


async def asked(
    service: Service,
    request: Request,
    body: ChatSampling,
    conversation: Sequence[Mapping[str, Any]],
    wish: Wish,
    arguments: Mapping[str, Any],
) -> ChatAsk:
    """Queue a conversation. Raises `RequestError`, `ApiError`, `EngineDead`; nothing is queued or in use then."""
    turn, n = None, body.n or 1
    service.admit(body.model, 1, n)
    if body.session_id is not None:
        turn, prompt = await service.turn(request, body.session_id, n, conversation, wish.shown, arguments)
        conversation = turn.messages
    else:
        prompt = await service.text.encode_chat(conversation, wish.shown, arguments)
    try:
        wish = wish.behind_thoughts(prompt)
        params = body.sampling(
            service.room([prompt]) if body.most_tokens is None else body.most_tokens,
            service.salt(request, body.cache_salt),
            logprobs=body.wanted_logprobs,
            **wish.sampling(body.skip_special_tokens),
        )

        new_parser = wish.parsers(prompt, conversation, stream=bool(body.stream))
        return ChatAsk(service.generate([prompt], params), turn, wish, new_parser)
    except BaseException:
        if turn is not None:
            turn.end()
        raise
