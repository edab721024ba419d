"""How the served model writes thoughts and calls, and what that means for one chat request."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from statewise.engine.structure import Structure
from statewise.engine.tokenizer import Tokenizer
from statewise.errors import RequestError
from statewise.server.answers import (
    AnswerParser,
    Message,
    Tools,
    family_of,
    make_parser,
    needed_tags,
    new_ids,
    opens_thinking,
    structure_for,
    takes_tools,
)

PROMPT_END = 16  # tokens of a prompt that can hold the tag which opens thoughts
THINK_END = "</think>"


class Dialect:
    """What is known of a model's answers before any request."""

    def __init__(
        self, tokenizer: Tokenizer | None, family: str | None = None, config: Mapping[str, Any] | None = None
    ) -> None:
        """`family` overrides what the chat template and the model's `config` show."""
        template = tokenizer.template_source(with_tools=True) if tokenizer else ""
        architectures = (config or {}).get("architectures") or [None]
        self.family = family or family_of(architectures[0], (config or {}).get("model_type"), template)
        self.takes_tools = takes_tools(template)
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.special_spellings if tokenizer else ())

    @classmethod
    def of(cls, directory: Path, tokenizer: Tokenizer | None, family: str | None = None) -> Dialect:
        """The dialect of the checkpoint in a directory."""
        path = directory / "config.json"
        config = json.loads(path.read_text()) if path.is_file() else {}
        return cls(tokenizer, family, config if isinstance(config, dict) else {})

    def wish(
        self,
        tools: Sequence[Mapping[str, Any]] | None,
        tool_choice: Any,
        parallel: bool | None,
        structure: Structure | None,
    ) -> Wish:
        """What a request wants besides text. Raises `RequestError`."""
        tools, tool_choice = _allowed(tools, tool_choice)
        offered = Tools(tools) if tools else None
        schema = structure_for(offered, tool_choice, bool(parallel))
        if tool_choice == "none":
            offered = None
        if offered and schema is None and not self.takes_tools:
            raise RequestError(
                "tools",
                "the chat template of this model does not tell it about tools; leave them out, or force a call with "
                "tool_choice",
            )
        if offered and schema is None and structure is not None:
            raise RequestError(
                structure.field,
                f"{structure.field} leaves the model no way to call a tool; leave out the tools, or force a call "
                "or none with tool_choice",
            )
        if schema is not None:
            structure = Structure.json_schema(schema, "tools")
        return Wish(
            dialect=self,
            tools=offered,
            shown=list(tools or ()) if offered and self.takes_tools else None,
            structure=structure,
            forced=schema is not None,
            one_call=parallel is False,
        )

    def opens_thinking(self, prompt: Sequence[int]) -> bool:
        """Whether an answer to this prompt begins inside of thoughts."""
        if self._tokenizer is None:
            return False
        return opens_thinking(self._tokenizer.decode(prompt[-PROMPT_END:], skip_special_tokens=False))

    def kept(self, family: str) -> tuple[str, ...]:
        """The special tokens that the text must hold for a parser of this family."""
        return tuple(tag for tag in needed_tags(family) if tag in self._special)


@dataclass(frozen=True)
class Wish:
    """What one chat request wants besides text: how to sample its answer and how to read it."""

    dialect: Dialect
    tools: Tools | None
    shown: list[Mapping[str, Any]] | None  # to the chat template
    structure: Structure | None
    forced: bool  # a call is all that may come
    one_call: bool

    @property
    def family(self) -> str:
        """Of the parser that the answer needs."""
        return "json" if self.forced else self.dialect.family if self.tools else "none"

    def sampling(self, skip_special_tokens: bool) -> dict[str, Any]:
        """The parameters that differ from those of a plain completion."""
        return {
            "structure": self.structure,
            "skip_special_tokens": skip_special_tokens,
            "kept_special_tokens": self.dialect.kept(self.family) if skip_special_tokens else (),
        }

    def behind_thoughts(self, prompt: Sequence[int]) -> Wish:
        """The same for a prompt that opens thoughts: the structure begins when they have ended."""
        if self.structure is None or not self.dialect.opens_thinking(prompt):
            return self
        return replace(self, structure=replace(self.structure, after=THINK_END))

    def parsers(
        self, prompt: Sequence[int], conversation: Sequence[Mapping[str, Any]], *, stream: bool
    ) -> Callable[[], AnswerParser]:
        """What makes a parser for each choice."""
        family = self.family
        thinking = self.dialect.opens_thinking(prompt)
        earlier = sum(len(message.get("tool_calls") or ()) for message in conversation)
        new_id = new_ids(self.dialect.family, earlier)

        def make() -> AnswerParser:
            return make_parser(family, self.tools, thinking=thinking, stream_arguments=stream, new_id=new_id)

        return make


def _allowed(
    tools: Sequence[Mapping[str, Any]] | None, tool_choice: Any
) -> tuple[Sequence[Mapping[str, Any]] | None, Any]:
    """The tools and the choice that a choice of the type `allowed_tools` comes to; other choices stay."""
    if not isinstance(tool_choice, Mapping) or tool_choice.get("type") != "allowed_tools":
        return tools, tool_choice
    inner = tool_choice.get("allowed_tools", tool_choice)
    listed = inner.get("tools") if isinstance(inner, Mapping) else None
    if not isinstance(listed, list) or inner.get("mode") not in ("auto", "required"):
        raise RequestError("tool_choice", "tool_choice of the type allowed_tools needs a mode and a list of tools")
    names = {_name(one) for one in listed}
    allowed = [tool for tool in tools or () if _name(tool) in names]
    if len(allowed) < len(names):
        raise RequestError("tool_choice", "tool_choice allows a tool that is not in tools")
    return allowed, inner["mode"]


def _name(tool: Any) -> Any:
    """The name of a tool in either API's form."""
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    return function.get("name") if isinstance(function, Mapping) else None


def is_whole(arguments: str) -> bool:
    """Whether the arguments of a call are all there."""
    try:
        return isinstance(json.loads(arguments), dict)
    except (ValueError, RecursionError):
        return False


def whole_calls(answer: Message) -> Message:
    """The answer without a call that broke off: no template could show it."""
    return replace(answer, tool_calls=tuple(call for call in answer.tool_calls if is_whole(call.arguments)))


def as_message(answer: Message) -> dict[str, Any]:
    """An answer as a message of OpenAI's API."""
    spelled: dict[str, Any] = {"role": "assistant", "content": answer.content}
    if answer.reasoning is not None:
        spelled["reasoning_content"] = answer.reasoning
    if answer.tool_calls:
        spelled["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in answer.tool_calls
        ]
    return spelled
