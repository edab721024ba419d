"""From the prompts of HTTP requests to token ids, off the event loop and within bounds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from statewise.engine.sampler import check_token_ids
from statewise.engine.tokenizer import Tokenizer
from statewise.errors import RequestError

Result = TypeVar("Result")


class TextSide:
    """The tokenizer of a server. Without one, only token ids can be served."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: Callable[[], int], seconds: float) -> None:
        """`vocab_size` tells how many token ids there are, once the model is loaded."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._seconds = seconds

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
        check_token_ids("prompt", ids, self._vocab_size())
        return ids

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        tokenizer = self.tokenizer
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
        return await self.bounded(
            "messages", lambda: tokenizer.encode_chat(messages, add_generation_prompt, tools, **(arguments or {}))
        )

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens)

    def token_text(self, token: int) -> str:
        """A token by itself, as log-probabilities spell it."""
        return self._tokenizer.decode([token], skip_special_tokens=False) if self._tokenizer else f"token_id:{token}"

    async def bounded(self, field: str, work: Callable[[], Result]) -> Result:
        """The result of `work`, which runs beside the event loop. Raises `RequestError` when it takes too long."""
        try:
            return await asyncio.wait_for(asyncio.to_thread(work), self._seconds)
        except TimeoutError:
            raise RequestError(field, f"{field} took more than {self._seconds:g} s to turn into tokens") from None
