"""Which parser an answer needs: by the family of the model, the request's tools and the prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from secrets import token_hex
from types import MappingProxyType

from statewise.errors import ConfigError
from statewise.server.answers.formats import CallFormat, NoCalls
from statewise.server.answers.json_calls import BareJson, JsonCalls
from statewise.server.answers.kimi import CALL_BEGIN, SECTION_BEGIN, KimiCalls
from statewise.server.answers.ling import LingCalls
from statewise.server.answers.minimax import MiniMaxCalls
from statewise.server.answers.parts import AnswerParser
from statewise.server.answers.plain import PlainAnswer
from statewise.server.answers.reader import THINK_BEGIN, THINK_END, AnswerReader
from statewise.server.answers.tools import Tools
from statewise.server.answers.writer import Writer

FAMILIES: Mapping[str, type[CallFormat]] = MappingProxyType(
    {
        "kimi": KimiCalls,
        "minimax": MiniMaxCalls,
        "ling": LingCalls,
        "hermes": JsonCalls,
        "json": BareJson,
        "none": NoCalls,
    }
)

# The beginning of an architecture's name, or of a model_type without its underscores.
_ARCHITECTURES = (("kimi", "kimi"), ("minimax", "minimax"), ("bailing", "ling"), ("qwen", "hermes"))


def make_parser(
    family: str,
    tools: Tools | None = None,
    *,
    reasoning: bool = True,
    thinking: bool = False,
    stream_arguments: bool = True,
    new_id: Callable[[str, int], str] | None = None,
) -> AnswerParser:
    """A parser for one answer.

    `tools`: what may be called; without any, nothing is a call. `reasoning`: thoughts are told apart from the content.
    `thinking`: the prompt ends inside of thoughts (see `opens_thinking`). `stream_arguments`: arguments are told as
    they come, so that a call which breaks off stays one; otherwise a call is told when it is whole, and is content
    where it never is. `new_id` makes the id of a call from its name and its number. The text must hold `needed_tags`
    of the family. Raises `ConfigError` for an unknown family.
    """
    wanted = _format(family)
    new_format = wanted if tools else NoCalls
    writer = Writer(tools, new_id or new_ids(family), stream_arguments)
    reader = AnswerReader(new_format, writer, reasoning=reasoning, thinking=thinking)
    return reader if new_format is not NoCalls or thinking else PlainAnswer(reader)


def needed_tags(family: str) -> tuple[str, ...]:
    """The tags that a family's parser looks for: where they are special tokens, they must stay in the text.

    Raises `ConfigError` for an unknown family.
    """
    found = _format(family)
    return (THINK_BEGIN, THINK_END, *found.openers, *found.closers, *found.inner)


def _format(family: str) -> type[CallFormat]:
    if family not in FAMILIES:
        raise ConfigError(f"answer format '{family}' is not known; choose one of {', '.join(FAMILIES)}")
    return FAMILIES[family]


def new_ids(family: str, earlier_calls: int = 0) -> Callable[[str, int], str]:
    """Ids as the family's chat template wants them back; `earlier_calls` were made in the conversation so far."""
    if family == "kimi":
        return lambda name, number: f"functions.{name}:{earlier_calls + number}"
    return lambda name, number: f"call_{token_hex(12)}"


def family_of(architecture: str | None = None, model_type: str | None = None, chat_template: str | None = None) -> str:
    """The family whose format a model writes calls in, by what its chat template shows, else by its architecture.

    A model whose template knows no tools, such as the demo model's, has learnt no format: "hermes" serves it.
    """
    template = chat_template or ""
    if any(marker in template for marker in (CALL_BEGIN, *SECTION_BEGIN)):
        return "kimi"
    if any(marker in template for marker in (*MiniMaxCalls.openers, "function_setting=functions")):
        return "minimax"
    if "<arg_key>" in template or ("<tool_call>" in template and "<role>" in template):
        return "ling"
    if "<tool_call>" in template or (template and not takes_tools(template)):
        return "hermes"
    for name in (architecture or "", model_type or ""):
        plain = name.lower().replace("_", "")
        for beginning, family in _ARCHITECTURES:
            if plain.startswith(beginning):
                return family
    return "hermes"


def takes_tools(chat_template: str) -> bool:
    """Whether a chat template tells the model about the tools of a request."""
    return "tools" in chat_template


def opens_thinking(prompt: str) -> bool:
    """Whether a prompt ends inside of thoughts, so that the answer begins there: its last tag is <think>."""
    return prompt.rstrip().endswith(THINK_BEGIN)
