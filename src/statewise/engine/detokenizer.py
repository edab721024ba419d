"""Text of a generation, piece by piece, while its tokens arrive. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# The bytes of an unfinished UTF-8 character: at most three, each of which may show as a replacement character.
_MAX_UNFINISHED = 3
# Tokens read again before a new one, because some decoders look at the left neighbour.
_CONTEXT = 6
_MAX_WINDOW = 64


class IncrementalDecoder:
    """Turns a growing list of tokens into text. The pieces together equal one decode of all the tokens.

    A trailing replacement character may be the beginning of a character whose bytes continue in the next token, so it
    is held back until that is known. (`tokenizers.decoders.DecodeStream` holds back whole tokens, cannot be flushed at
    the end and raises on some byte sequences.) The work per token is bounded, whatever the tokens are.
    """

    def __init__(self, decode: Callable[[list[int]], str], is_silent: Callable[[int], bool]) -> None:
        """`decode` turns ids into text; `is_silent` tells an id that decode leaves out."""
        self._decode = decode
        self._is_silent = is_silent
        self._window: list[int] = []  # the last tokens: some whose text is out, then those that are undecided
        self._shown = ""  # the part of the window's text that is out
        self._text = ""  # the window's text

    def push(self, token_id: int) -> str:
        """The text that this token made certain; often empty."""
        if self._is_silent(token_id):
            return ""
        self._window.append(token_id)
        self._text = self._decode(self._window)
        unfinished = len(self._text) - len(self._text.rstrip(_REPLACEMENT))
        certain = self._text[: len(self._text) - min(unfinished, _MAX_UNFINISHED)]
        overfull = len(self._window) > _MAX_WINDOW
        # A byte-fallback decoder shows a whole run of byte tokens as invalid until the run ends in a full character.
        settled = certain.startswith(self._shown)
        piece = certain[len(self._shown) :] if settled or overfull else ""
        if piece or settled:
            self._shown = certain
        if overfull or (len(self._window) > 2 * _CONTEXT and self._shown == self._text):
            self._shorten(forced=overfull)
        return piece

    def finish(self) -> str:
        """What was held back: an unfinished character shows as U+FFFD."""
        piece = self._text[len(self._shown) :]
        self._window, self._shown, self._text = [], "", ""
        return piece

    def _shorten(self, forced: bool) -> None:
        """Forget the oldest tokens, cutting where no character is split."""
        held = len(self._text) - len(self._shown)
        for keep in range(_CONTEXT, _CONTEXT + _MAX_UNFINISHED + 1):
            tail = self._window[-keep:]
            text = self._decode(tail)
            if self._text.endswith(text) or (forced and keep == _CONTEXT + _MAX_UNFINISHED):
                self._window, self._text = tail, text
                self._shown = text[: max(len(text) - held, 0)]
                return
