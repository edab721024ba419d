"""The request of `POST /v1/responses`, and the conversation that it spells.

A stateless core: everything the model is to know comes with the request, or lies in a session. What would need the
server to remember responses is refused in words, not ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from statewise.engine.chat_template import check_arguments
from statewise.engine.structure import Structure
from statewise.errors import RequestError
from statewise.server.protocol import ChatSampling, Text, ToolList, no_longer_than, thinking_arguments

_TEXT_PARTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text", "refusal")
_UNSERVED = {
    "previous_response_id": "this server keeps no responses: send the whole conversation as input, or use session_id",
    "conversation": "this server keeps no conversations of this API: use session_id",
    "background": "answers are given while the client waits: leave background out",
    "prompt": "this server keeps no prompt templates: send instructions and input",
}


class TextFormat(BaseModel):
    """The form of the answer."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Annotated[str, Field(max_length=256)] | None = None
    description: Annotated[str, Field(max_length=1 << 16)] | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None

    def structure(self) -> Structure | None:
        if self.type == "text":
            return None
        if self.type == "json_object":
            return Structure.json_object("text.format")
        if self.schema_ is None:
            raise RequestError("text.format.schema", "text.format.schema is missing: send the JSON schema")
        return Structure.json_schema(self.schema_, "text.format.schema")


class TextOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")

    format: TextFormat = TextFormat()


class ReasoningOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")

    effort: Annotated[str, Field(max_length=32)] | None = None


class ResponseRequest(ChatSampling):
    """`POST /v1/responses`."""

    input: Text | Annotated[list[dict[str, Any]], Field(min_length=1, max_length=1 << 14)]
    instructions: Text | None = None
    max_output_tokens: int | None = None
    tools: ToolList | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions = TextOptions()
    reasoning: ReasoningOptions | None = None
    include: Annotated[list[str], Field(max_length=16)] | None = None
    top_logprobs: int | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16), no_longer_than(16)] | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=32)] | None = None
    truncation: Literal["disabled", "auto"] | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    prompt: Any = None

    @property
    def most_tokens(self) -> int | None:
        return self.max_output_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        wanted = "message.output_text.logprobs" in (self.include or ()) or self.top_logprobs is not None
        return (self.top_logprobs or 0) if wanted else None

    @property
    def template_arguments(self) -> dict[str, Any]:
        """Raises `RequestError` for one that no template may be given."""
        check_arguments(self.chat_template_kwargs or {})
        effort = self.reasoning.effort if self.reasoning else None
        return thinking_arguments(effort) | (self.chat_template_kwargs or {})

    def own_names(self) -> Mapping[str, str]:
        return {"max_tokens": "max_output_tokens", "logprobs": "top_logprobs"}

    def check(self) -> None:
        """Raise `RequestError` for what is not served."""
        for field, message in _UNSERVED.items():
            if getattr(self, field):
                raise RequestError(field, f"{field} is not supported: {message}")
        if self.truncation == "auto":
            raise RequestError("truncation", "truncation 'auto' is not supported: shorten the input and leave it out")
        if (self.n or 1) != 1:
            raise RequestError("n", "a response has one answer: leave n out")

    def chat_tools(self) -> list[dict[str, Any]] | None:
        """The tools as chat templates know them. Raises `RequestError` for those that only OpenAI runs."""
        listed = []
        for index, tool in enumerate(self.tools or ()):
            if tool.get("type") != "function":
                kind = str(tool.get("type"))[:64]
                raise RequestError(f"tools[{index}].type", f"tools[{index}] is a {kind!r}: only functions are served")
            function = {key: tool[key] for key in ("name", "description", "parameters") if tool.get(key) is not None}
            listed.append({"type": "function", "function": function})
        return listed or None

    def chat_tool_choice(self) -> Any:
        if isinstance(self.tool_choice, Mapping) and self.tool_choice.get("type") == "function":
            return {"type": "function", "function": {"name": self.tool_choice.get("name")}}
        return self.tool_choice

    def conversation_messages(self) -> list[dict[str, Any]]:
        """The messages that instructions and input make. Raises `RequestError`, which names the item at fault."""
        begin = [{"role": "system", "content": self.instructions}] if self.instructions else []
        if isinstance(self.input, str):
            return [*begin, {"role": "user", "content": self.input}]
        return begin + _messages(self.input)


def _messages(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    thought: str | None = None  # of the assistant's message that follows
    for index, item in enumerate(items):
        field = f"input[{index}]"
        kind = item.get("type", "message")
        if kind == "message":
            role = item.get("role")
            message = {
                "role": "system" if role == "developer" else role,
                "content": _text(item.get("content"), f"{field}.content"),
            }
            if role == "assistant" and thought:
                message["reasoning_content"] = thought
            made.append(message)
            thought = None
        elif kind == "reasoning":
            thought = _text(item.get("content") or item.get("summary") or "", f"{field}.content")
        elif kind == "function_call":
            call = {
                "id": item.get("call_id"),
                "type": "function",
                "function": {"name": item.get("name"), "arguments": item.get("arguments", "{}")},
            }
            last = made[-1] if made and made[-1]["role"] == "assistant" and thought is None else None
            if last is None:
                last = {"role": "assistant", "content": ""}
                if thought:
                    last["reasoning_content"] = thought
                made.append(last)
            last.setdefault("tool_calls", []).append(call)
            thought = None
        elif kind == "function_call_output":
            output = _text(item.get("output"), f"{field}.output")
            made.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
        else:
            raise RequestError(f"{field}.type", f"{field} is a {str(kind)[:64]!r}, which this server does not take")
    return made


def _text(content: Any, field: str) -> str:
    """The text of a string or of a list of text parts."""
    if isinstance(content, str):
        return content
    texts = []
    for part in content if isinstance(content, list) else [None]:
        text = None
        if isinstance(part, Mapping) and part.get("type") in _TEXT_PARTS:
            text = part.get("text", part.get("refusal"))
        if not isinstance(text, str):
            raise RequestError(field, f"{field} must be a string or a list of text parts: only text is served")
        texts.append(text)
    return "".join(texts)
