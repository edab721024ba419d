"""From the prompts of HTTP requests to token ids, off the event loop and within bounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from statewise.api.conversation import Content
from statewise.engine.sampling_params import check_token_ids
from statewise.engine.tokenizer import Tokenizer
from statewise.errors import RequestError
from statewise.server.bounded import BoundedWork
from statewise.server.spelling import TokenSpelling

Result = TypeVar("Result")


class TextSide:
    """The tokenizer of a server. Without one, only token ids can be served."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        vocab_size: Callable[[], int],
        seconds: float,
        max_length: Callable[[], int | None] = lambda: None,
    ) -> None:
        """`vocab_size` tells how many token ids there are, once the model is loaded; `max_length`, how many fit."""
        self._tokenizer = tokenizer
        self.token_text = TokenSpelling(tokenizer)
        self._vocab_size = vocab_size
        self._max_length = max_length
        self._seconds = seconds
        self._work = BoundedWork(seconds)

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises `RequestError` where there is none."""
        if self._tokenizer is None:
            raise RequestError("prompt", "this model has no tokenizer; send the prompt as token ids")
        return self._tokenizer

    @property
    def optional(self) -> Tokenizer | None:
        return self._tokenizer

    async def prompts(self, prompt: str | Sequence[Any]) -> list[list[int]]:
        """Text, token ids, or a list of either. Raises `RequestError`."""
        if isinstance(prompt, str):
            return [await self.encode(prompt)]
        if not prompt:
            raise RequestError("prompt", "the prompt is empty: it must have at least one token")
        if prompt and isinstance(prompt[0], int):
            return [self.checked([int(token) for token in prompt])]
        return [await self.encode(one) if isinstance(one, str) else self.checked(list(one)) for one in prompt]

    def checked(self, ids: list[int]) -> list[int]:
        limit = self._max_length()
        if limit is not None and len(ids) > limit:
            raise too_long(limit, len(ids))
        check_token_ids("prompt", ids, self._vocab_size())
        return ids

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        tokenizer = self.tokenizer
        self.check_size("prompt", text)
        return await self.bounded("prompt", lambda: tokenizer.encode(text, add_special_tokens))

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        arguments: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Raises `RequestError` for messages that the template refuses or takes too long for."""
        tokenizer = self.tokenizer
        self.check_size("messages", messages)
        return await self.bounded(
            "messages", lambda: tokenizer.encode_chat(messages, add_generation_prompt, tools, **(arguments or {}))
        )

    def check_size(self, field: str, content: Content) -> None:
        """Refuse what can be too long only, before any time goes into its tokens. Raises `RequestError`."""
        limit = self._max_length()
        if limit is None or self._tokenizer is None:
            return
        # A template may leave thoughts of earlier answers out, so only the contents of messages count.
        if isinstance(content, str):
            characters = len(content)
        else:
            characters = sum(len(_text_of(one)) for one in content if isinstance(one, Mapping))
        if characters > limit * self._tokenizer.longest_token:
            raise RequestError(
                field,
                f"This model's maximum context length is {limit} tokens. However, your {field} has {characters} "
                f"characters, more than any {limit} tokens spell. Please reduce the length of the input prompt.",
            )

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens)

    def close(self) -> None:
        """Nothing more will be asked."""
        self._work.close()

    async def bounded(self, field: str, work: Callable[[], Result]) -> Result:
        """The result of `work`, which runs beside the event loop. Raises `RequestError` when it takes too long."""
        try:
            return await self._work.run(work)
        except TimeoutError:
            raise RequestError(field, f"{field} took more than {self._seconds:g} s to turn into tokens") from None


def too_long(limit: int, tokens: int) -> RequestError:
    """What a prompt of so many tokens is told."""
    return RequestError(
        "prompt",
        f"This model's maximum context length is {limit} tokens. However, your prompt contains {tokens} input tokens. "
        "Please reduce the length of the input prompt.",
    )


def _text_of(message: Mapping[str, Any]) -> str:
    """What a message says, or as much of it as is text."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = (part.get("text") for part in parts if isinstance(part, Mapping))
    return "".join(text for text in texts if isinstance(text, str))
