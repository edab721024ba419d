"""The bytes that a token stands for, which need not be whole characters. Imports no torch."""

from __future__ import annotations

import json
import re
from typing import Any

import tokenizers

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Decoders that change no single token, but what stands between tokens or at the ends of the text.
_NEUTRAL = frozenset(("Fuse", "Strip"))


class TokenBytes:
    """Looks a token's bytes up in the vocabulary, by what the tokenizer's decoder makes of its entries."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._spelled = {
            token_id: token.content for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        }
        self._alphabet: dict[str, int] = {}
        self._replaced: list[tuple[str, str]] = []
        self._bytes = False  # whether <0x41> is a byte
        decoder = backend.decoder
        self._known = decoder is not None and all(map(self._takes, _flat(json.loads(decoder.__getstate__()))))

    def of(self, token_id: int) -> bytes | None:
        """None where it is not known: an id beyond the vocabulary, or a kind of tokenizer that is not."""
        spelled = self._spelled.get(token_id)
        if spelled is not None:
            return spelled.encode()
        piece = self._backend.id_to_token(token_id)
        if piece is None or not self._known:
            return None
        if self._alphabet:
            found = [self._alphabet.get(character) for character in piece]
            return piece.encode() if None in found else bytes(byte for byte in found if byte is not None)
        for mark, text in self._replaced:
            piece = piece.replace(mark, text)
        byte = _BYTE.fullmatch(piece) if self._bytes else None
        return bytes((int(byte[1], 16),)) if byte else piece.encode()

    def _takes(self, step: dict[str, Any]) -> bool:
        """Learn what one decoder does. False where that is not known."""
        kind, pattern = step.get("type"), step.get("pattern")
        if kind == "ByteLevel":
            self._alphabet = _byte_alphabet()
        elif kind == "ByteFallback":
            self._bytes = True
        elif kind == "Metaspace":
            self._replaced.append((step["replacement"], " "))
        elif kind == "Replace" and isinstance(pattern, dict) and "String" in pattern:
            self._replaced.append((pattern["String"], step["content"]))
        else:
            return kind in _NEUTRAL
        return True


def _flat(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder.get("type") != "Sequence":
        return [decoder]
    return [step for inner in decoder["decoders"] for step in _flat(inner)]


def _byte_alphabet() -> dict[str, int]:
    """How byte-level vocabularies write a byte: visible Latin-1 as itself, the others in order from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + index): byte for index, byte in enumerate(others)}
