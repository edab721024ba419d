"""Text to token ids and back, from the files that a checkpoint brings. Imports no torch."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from statewise.engine.detokenizer import IncrementalDecoder
from statewise.engine.hiding import Hiding
from statewise.engine.token_bytes import TokenBytes
from statewise.errors import CheckpointError, RequestError

__all__ = ["IncrementalDecoder", "Tokenizer", "end_token_ids"]


class Tokenizer:
    """A checkpoint's tokenizer, chat template and end tokens."""

    def __init__(self, backend: tokenizers.Tokenizer, settings: Mapping[str, Any], eos_ids: Iterable[int] = ()) -> None:
        """`settings` is what tokenizer_config.json holds; `eos_ids` come from the model's configs."""
        self._backend = backend
        self._names = _special_token_names(settings)
        self._template_source = settings.get("chat_template")
        self._templates: dict[str, Any] = {}
        self._special = {
            token.content: token_id
            for token_id, token in backend.get_added_tokens_decoder().items()
            if token.special and token.content
        }
        self._special_ids = frozenset(self._special.values())
        # The longest first, as the backend itself matches.
        spellings = sorted(map(re.escape, self._special), key=len, reverse=True)
        self._special_pattern = re.compile("|".join(spellings)) if spellings else None
        self._literal_backend: tokenizers.Tokenizer | None = None

        # One more than the highest id: ids may have gaps, so their number is not enough.
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.longest_token: int = max(map(len, backend.get_vocab(with_added_tokens=True)), default=1)  # characters
        self.bos_id: int | None = self._id_of("bos_token")
        own_eos = self._id_of("eos_token")
        self.eos_ids: frozenset[int] = frozenset(eos_ids) | (frozenset() if own_eos is None else {own_eos})

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer | None:
        """Read tokenizer.json and its companions; None where there is no tokenizer.json. Raises CheckpointError."""
        directory = Path(path)
        if not (directory / "tokenizer.json").is_file():
            return None
        try:
            backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        except Exception as error:  # the library raises bare Exception, nothing narrower
            raise CheckpointError(f"tokenizer.json cannot be read: {str(error).splitlines()[0][:200]}") from None
        # A length limit or padding set for training would silently cut prompts or add to them.
        backend.no_truncation()
        backend.no_padding()
        settings = _read_object(directory / "special_tokens_map.json")
        settings.update(_read_object(directory / "tokenizer_config.json"))
        if (directory / "chat_template.jinja").is_file():
            settings["chat_template"] = _read_text(directory / "chat_template.jinja")
        return cls(backend, settings, end_token_ids(directory))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, in which special tokens may be spelled out. Raises RequestError for invalid Unicode."""
        return _encode(self._backend, text, add_special_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; ids beyond the vocabulary (padding rows of the embedding) decode to nothing."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes | None:
        """What a token stands for, which may be part of a character; None where that is not known."""
        return self._token_bytes.of(token_id)

    def stream(self, skip_special_tokens: bool = True, kept: Collection[str] = ()) -> IncrementalDecoder:
        """A decoder for the tokens of one generation, as they come.

        `kept` are spellings of special tokens that stay although the others are skipped.
        """
        silent = self._special_ids - {self._special.get(one) for one in kept} if skip_special_tokens else frozenset()
        # Whatever is left out does not get as far as `decode`.
        return IncrementalDecoder(
            decode=lambda ids: self.decode(ids, skip_special_tokens=False),
            is_silent=lambda token_id: token_id in silent or self._backend.id_to_token(token_id) is None,
        )

    def to_json(self) -> str:
        """What tokenizer.json holds."""
        return str(self._backend.to_str())

    @property
    def special_spellings(self) -> tuple[str, ...]:
        """How the special tokens are spelled."""
        return tuple(self._special)

    @property
    def named_tokens(self) -> dict[str, str]:
        """The spellings of the special tokens that have a role, such as `eos_token`."""
        return dict(self._names)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._template_source)

    def template_source(self, with_tools: bool = False) -> str:
        """The text of the chat template that serves a request; empty where there is none."""
        source = self._template_source
        if isinstance(source, list):
            named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
            source = (named.get("tool_use") if with_tools else None) or named.get("default")
        if source and not isinstance(source, str):
            raise CheckpointError("tokenizer_config.json: chat_template must be a string or a list of named templates")
        return source or ""

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **arguments: Any,
    ) -> str:
        """The prompt text of a chat. Raises RequestError for malformed messages or where there is no template."""
        checked, template = self._checked(messages, tools, arguments)
        return str(template.render(checked, add_generation_prompt, tools or None, arguments))

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **arguments: Any,
    ) -> list[int]:
        """The prompt ids of a chat; nothing is added around the rendered text.

        A special token spelled in a message, a tool or an argument stays plain text: only the template's own ones
        control (`Hiding` says how, and what that means for the thoughts in an assistant's message).
        """
        checked, template = self._checked(messages, tools, arguments)
        source = self.template_source(with_tools=bool(tools))
        hiding = Hiding(self.special_spellings, template.words, source, (checked, tools, arguments))
        rendered = template.render(
            hiding.messages(checked), add_generation_prompt, hiding.value(tools) or None, hiding.value(arguments)
        )
        return self._encode_controlled(hiding.restore(rendered), self._controls(rendered))

    def _encode_controlled(self, text: str, controls: list[tuple[int, int]]) -> list[int]:
        """Encode text in which special tokens stand in these places (begin, end) and nowhere else."""
        known = [self._special[text[begin:end]] for begin, end in controls]
        if self._controls(text) == controls:
            ids = self.encode(text, add_special_tokens=False)
            # Where text is normalised before special tokens are sought, there may be more of them than are spelled.
            unknown = self._id_of("unk_token")
            found = Counter(one for one in ids if one in self._special_ids and one != unknown)
            if found <= Counter(known):
                return ids
        ids = []
        behind = 0
        for (begin, end), token_id in zip(controls, known, strict=True):
            ids += self._encode_literally(text[behind:begin])
            ids.append(token_id)
            behind = end
        return ids + self._encode_literally(text[behind:])

    def _controls(self, text: str) -> list[tuple[int, int]]:
        """Where special tokens are spelled."""
        return [match.span() for match in self._special_pattern.finditer(text)] if self._special_pattern else []

    def _checked(self, messages: Any, tools: Any, arguments: Mapping[str, Any]) -> tuple[list[dict[str, Any]], Any]:
        """The messages, normalised, and the template for them."""
        from statewise.engine.chat_template import check_arguments, check_messages, check_tools

        check_arguments(arguments)
        check_tools(tools)
        template = self._template(with_tools=bool(tools))
        return check_messages(messages), template

    def _template(self, with_tools: bool) -> Any:
        """The compiled template; checkpoints may name several, of which `tool_use` serves requests with tools."""
        from statewise.engine.chat_template import ChatTemplate

        source = self.template_source(with_tools)
        if not source:
            raise RequestError("messages", "this checkpoint has no chat template; send a plain prompt instead")
        if source not in self._templates:
            self._templates[source] = ChatTemplate(source, self._names)
        return self._templates[source]

    @cached_property
    def _token_bytes(self) -> TokenBytes:
        return TokenBytes(self._backend)

    def _encode_literally(self, text: str) -> list[int]:
        """Encode with special tokens read as ordinary text."""
        if self._literal_backend is None:
            literal = tokenizers.Tokenizer.from_str(self._backend.to_str())
            literal.encode_special_tokens = True
            self._literal_backend = literal
        return _encode(self._literal_backend, text, add_special_tokens=False) if text else []

    def _id_of(self, name: str) -> int | None:
        token = self._names.get(name)
        return None if token is None else self._backend.token_to_id(token)


def end_token_ids(directory: str | Path) -> frozenset[int]:
    """End-of-sequence ids that generation_config.json and config.json name; needs no tokenizer."""
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        settings = _read_object(Path(directory) / name)
        inner = settings.get("text_config")
        for holder in (settings, inner if isinstance(inner, dict) else {}):
            value = holder.get("eos_token_id")
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if any(isinstance(one, bool) or not isinstance(one, int) or one < 0 for one in ids):
                raise CheckpointError(f"{name}: eos_token_id must be a token id or a list of token ids, not {value!r}")
            found.update(ids)
    return frozenset(found)


def _encode(backend: tokenizers.Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    try:
        return list(backend.encode(text, add_special_tokens=add_special_tokens).ids)
    except (TypeError, UnicodeError):  # lone surrogates cannot be handed to the library
        raise RequestError("prompt", "the prompt must be a string of valid Unicode text") from None


def _special_token_names(settings: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and the like by name; a token is spelled as a string or as {content: …}."""
    names: dict[str, str] = {}
    for name, value in settings.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            names[name] = content
    return names


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path.name} cannot be read: {error}") from None


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where the file does not exist."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name} must hold a JSON object")
    return value
