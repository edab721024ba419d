"""From generated text to the parts of OpenAI's messages: content, reasoning and tool calls, whole or as they come.

What is a call, for every family: it stands where the family writes calls, names a tool of the request, and its
arguments begin as an object. From there on it stays a call while arguments stream; what follows up to the family's
closing tag belongs to it, even where it is not JSON or the text ends. With `stream_arguments=False` it must also be
whole. Whatever is no call comes back as content, tags included: unknown names, calls beyond the 128th, arguments that
are no object or exceed a million characters (from there on), text between calls. Only whitespace and tags around a
call vanish, so an answer without a call comes out as it was generated.
"""

from statewise.server.answers.choice import calls_from_json, structure_for
from statewise.server.answers.choose import (
    FAMILIES,
    family_of,
    make_parser,
    needed_tags,
    new_ids,
    opens_thinking,
    takes_tools,
)
from statewise.server.answers.parts import (
    AnswerParser,
    Content,
    Message,
    Part,
    Reasoning,
    ToolCall,
    ToolCallArguments,
    ToolCallBegin,
    message,
    parse,
)
from statewise.server.answers.tools import Tools

__all__ = [
    "FAMILIES",
    "AnswerParser",
    "Content",
    "Message",
    "Part",
    "Reasoning",
    "ToolCall",
    "ToolCallArguments",
    "ToolCallBegin",
    "Tools",
    "calls_from_json",
    "family_of",
    "make_parser",
    "message",
    "needed_tags",
    "new_ids",
    "opens_thinking",
    "parse",
    "structure_for",
    "takes_tools",
]
