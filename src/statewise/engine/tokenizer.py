"""Text to token ids and back, from the files that a checkpoint brings. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from statewise.engine.detokenizer import IncrementalDecoder
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
            token.content: token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        }
        self._special_ids = frozenset(self._special.values())
        # The longest first, as the backend itself matches.
        spellings = sorted((re.escape(text) for text in self._special if text), key=len, reverse=True)
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

    def stream(self, skip_special_tokens: bool = True) -> IncrementalDecoder:
        """A decoder for the tokens of one generation, as they come."""
        return IncrementalDecoder(
            decode=lambda ids: self.decode(ids, skip_special_tokens),
            is_silent=lambda token_id: self.is_silent(token_id, skip_special_tokens),
        )

    def is_silent(self, token_id: int, skip_special_tokens: bool) -> bool:
        """Whether decode leaves this id out."""
        if skip_special_tokens and token_id in self._special_ids:
            return True
        return self._backend.id_to_token(token_id) is None

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
        return self._render(messages, add_generation_prompt, tools, arguments)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **arguments: Any,
    ) -> list[int]:
        """The prompt ids of a chat; nothing is added around the rendered text.

        A special token spelled in a message or a tool stays plain text: only the template's own ones control. The
        spelling travels through the template as one private-use character and is put back when its text is encoded.
        """
        placeholders = self._placeholders(_strings((messages, tools)))
        if not placeholders:
            rendered = self._render(messages, add_generation_prompt, tools, arguments)
            return self.encode(rendered, add_special_tokens=False)
        assert self._special_pattern is not None
        hide = self._special_pattern
        rendered = self._render(
            _replace(messages, lambda text: hide.sub(lambda match: placeholders[match[0]], text)),
            add_generation_prompt,
            _replace(tools, lambda text: hide.sub(lambda match: placeholders[match[0]], text)),
            arguments,
        )
        restore = str.maketrans({character: spelling for spelling, character in placeholders.items()})
        ids: list[int] = []
        end = 0
        for match in hide.finditer(rendered):
            ids += self._encode_literally(rendered[end : match.start()].translate(restore))
            ids.append(self._special[match[0]])
            end = match.end()
        return ids + self._encode_literally(rendered[end:].translate(restore))

    def _render(self, messages: Any, add_generation_prompt: bool, tools: Any, arguments: Mapping[str, Any]) -> str:
        from statewise.engine.chat_template import check_arguments, check_messages, check_tools

        check_arguments(arguments)
        check_tools(tools)
        template = self._template(with_tools=bool(tools))
        return str(template.render(check_messages(messages), add_generation_prompt, tools or None, arguments))

    def _template(self, with_tools: bool) -> Any:
        """The compiled template; checkpoints may name several, of which `tool_use` serves requests with tools."""
        from statewise.engine.chat_template import ChatTemplate

        source = self.template_source(with_tools)
        if not source:
            raise RequestError("messages", "this checkpoint has no chat template; send a plain prompt instead")
        if source not in self._templates:
            self._templates[source] = ChatTemplate(source, self._names)
        return self._templates[source]

    def _placeholders(self, texts: Iterable[str]) -> dict[str, str]:
        """For each special token spelled in `texts`, a private-use character that none of them holds."""
        if self._special_pattern is None:
            return {}
        found: dict[str, str] = {}
        used: set[str] = set()
        for text in texts:
            used.update(character for character in text if "\ue000" <= character <= "\uf8ff")
            found.update((match[0], "") for match in self._special_pattern.finditer(text))
        free = (chr(code) for code in range(0xE000, 0xF900) if chr(code) not in used)
        for spelling in found:
            character = next(free, None)
            if character is None:
                raise RequestError("messages", "messages use too many private-use characters beside special tokens")
            found[spelling] = character
        return found

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


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _strings(key)
            yield from _strings(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _strings(inner)


def _replace(value: Any, change: Any) -> Any:
    """A copy of nested data with `change` applied to every string."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_replace(key, change): _replace(inner, change) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replace(inner, change) for inner in value]
    return value


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
