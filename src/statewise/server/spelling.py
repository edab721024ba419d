"""Single tokens, as log-probabilities tell of them."""

from __future__ import annotations

from statewise.engine.tokenizer import Tokenizer


class TokenSpelling:
    """Called with a token id, its text. `bytes` is what the token stands for, which may be part of a character."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    def __call__(self, token: int) -> str:
        """U+FFFD stands for part of a character."""
        return self._tokenizer.decode([token], skip_special_tokens=False) if self._tokenizer else f"token_id:{token}"

    def bytes(self, token: int) -> bytes:
        """The text's bytes where the vocabulary does not tell: then no token is part of a character."""
        known = self._tokenizer.token_bytes(token) if self._tokenizer else None
        return self(token).encode() if known is None else known
