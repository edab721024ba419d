"""The requests of OpenAI's API, with the additions that clients of other servers send, and ours for sessions.

Sizes are bounded here; what the numbers may be, `SamplingParams` says. Unknown fields are ignored, as OpenAI's own
clients expect of a server that is older than they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from statewise.engine.chat_template import check_arguments
from statewise.engine.sampling_params import SamplingParams
from statewise.engine.structure import Structure
from statewise.errors import RequestError

MAX_ITEMS = 1 << 20
TokenIds = Annotated[list[int], Field(max_length=1 << 24, fail_fast=True)]  # a list of a million errors takes a minute
Text = Annotated[str, Field(max_length=1 << 24)]
ToolList = Annotated[list[dict[str, Any]], Field(max_length=128)]


def no_longer_than(limit: int) -> BeforeValidator:
    """Refuse an object or a list of more entries before any of them is looked at."""

    def check(value: Any) -> Any:
        if isinstance(value, dict | list) and len(value) > limit:
            raise ValueError(f"it has {len(value)} entries, at most {limit} are allowed")
        return value

    return BeforeValidator(check)


class StreamOptions(BaseModel):
    """What a stream carries beside its text."""

    include_usage: bool = False


class JsonSchemaFormat(BaseModel):
    """A JSON schema by name. `strict` or not, the answer follows it."""

    model_config = ConfigDict(extra="ignore")

    name: Annotated[str, Field(max_length=256)] | None = None
    description: Annotated[str, Field(max_length=1 << 16)] | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """What the answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    def structure(self, field: str = "response_format") -> Structure | None:
        """Raises `RequestError`."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return Structure.json_object(field)
        if self.json_schema is None or self.json_schema.schema_ is None:
            raise RequestError(f"{field}.json_schema", f"{field}.json_schema.schema is missing: send the JSON schema")
        return Structure.json_schema(self.json_schema.schema_, f"{field}.json_schema.schema")


class StructuredOutputs(BaseModel):
    """The form of an answer, one of several ways to say it."""

    json_: dict[str, Any] | bool | Text | None = Field(default=None, alias="json", description="A JSON schema.")
    json_object: bool | None = None
    regex: Text | None = None
    choice: Annotated[list[str], Field(max_length=1024)] | None = None
    grammar: Text | None = Field(default=None, description="A Lark grammar; the answer derives from its rule `start`.")


class Sampling(BaseModel):
    """What completions and chats have in common."""

    model_config = ConfigDict(extra="ignore")

    model: Annotated[str, Field(max_length=4096)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = Field(None, description="0 or -1: no limit")
    min_p: float | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=64)] | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=1024)] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=1024), no_longer_than(1024)] | None = None
    skip_special_tokens: bool = True
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=4096)] | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = Field(
        None, description="Requests share remembered prompts with those of the same salt only."
    )
    cache_breakpoints: Annotated[list[int], Field(max_length=64)] | None = Field(
        None, description="Token positions of the prompt whose state is to be kept."
    )
    session_id: Annotated[str, Field(max_length=64)] | None = Field(
        None, description="Go on in this session: the prompt is what is new, and the answer becomes part of it."
    )

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | bool | Text | None = None
    guided_regex: Text | None = None
    guided_choice: Annotated[list[str], Field(max_length=1024)] | None = None
    guided_grammar: Text | None = None

    def structure(self) -> Structure | None:
        """The form that the answer must have. Raises `RequestError` for a form that cannot be, and for two."""
        inner = self.structured_outputs or StructuredOutputs()
        asked: list[tuple[str, Any, Callable[[Any, str], Structure | None]]] = [
            ("response_format", self.response_format, ResponseFormat.structure),
            ("structured_outputs.json", inner.json_, Structure.json_schema),
            ("structured_outputs.json_object", inner.json_object or None, lambda _, name: Structure.json_object(name)),
            ("structured_outputs.regex", inner.regex, Structure.regex),
            ("structured_outputs.choice", inner.choice, Structure.choice),
            ("structured_outputs.grammar", inner.grammar, Structure.grammar),
            ("guided_json", self.guided_json, Structure.json_schema),
            ("guided_regex", self.guided_regex, Structure.regex),
            ("guided_choice", self.guided_choice, Structure.choice),
            ("guided_grammar", self.guided_grammar, Structure.grammar),
        ]
        found = [(name, make(value, name)) for name, value, make in asked if value is not None]
        found = [(name, structure) for name, structure in found if structure is not None]
        if len(found) > 1:
            raise RequestError(found[1][0], f"{found[0][0]} and {found[1][0]} both say what the answer is; send one")
        return found[0][1] if found else None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, max_tokens: int, salt: str | None, **more: Any) -> SamplingParams:
        """The engine's parameters. Raises `RequestError`."""
        given: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(self.top_k, 0) if self.top_k >= -1 else self.top_k,
            "min_p": self.min_p,
            "n": self.n,
            "seed": self.seed if self.seed is None or not -(1 << 63) <= self.seed < 0 else self.seed + (1 << 63),
            "stop": self.stop,
            "stop_token_ids": self.stop_token_ids,
            "min_tokens": self.min_tokens,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "logit_bias": _biases(self.logit_bias),
            "cache_breakpoints": self.cache_breakpoints,
            "structure": self.structure() if "structure" not in more else None,
            "skip_special_tokens": self.skip_special_tokens,
            **more,
        }
        try:
            return SamplingParams(
                max_tokens=max_tokens,
                cache_salt=salt,
                include_stop_str_in_output=self.include_stop_str_in_output,
                ignore_eos=self.ignore_eos,
                **{name: value for name, value in given.items() if value is not None},
            )
        except RequestError as error:
            own = self.own_names().get(error.field, error.field)
            raise RequestError(own, str(error).replace(error.field, own)) from None

    def own_names(self) -> Mapping[str, str]:
        """What this API calls fields of `SamplingParams` that have another name there."""
        return {}


def _prompt_kind(value: Any) -> str:
    """Which of a prompt's forms is meant, so that the others do not look at it."""
    if not isinstance(value, list):
        return "<text>"
    first = value[0] if value else 0
    return "<texts>" if isinstance(first, str) else "<lists>" if isinstance(first, list) else "<token ids>"


class CompletionRequest(Sampling):
    """`POST /v1/completions`."""

    prompt: Annotated[
        Annotated[Text, Tag("<text>")]
        | Annotated[TokenIds, Tag("<token ids>")]
        | Annotated[list[Text], Field(max_length=128, fail_fast=True), no_longer_than(128), Tag("<texts>")]
        | Annotated[list[TokenIds], Field(max_length=128, fail_fast=True), no_longer_than(128), Tag("<lists>")],
        Discriminator(_prompt_kind),
    ] = Field(description="Text, token ids, or a list of up to 128 of either.")
    max_tokens: int | None = 16
    logprobs: int | None = None
    echo: bool | None = False
    best_of: int | None = None
    suffix: str | None = Field(None, max_length=1 << 20)


class Message(BaseModel):
    """One message of a conversation, as the chat template gets it."""

    model_config = ConfigDict(extra="allow")

    # No other: a template may build a control token of a role.
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Any = None

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > 64:
            raise ValueError("a message has at most 64 fields")
        return value


class ChatSampling(Sampling):
    """What the APIs for conversations have in common."""

    @property
    def most_tokens(self) -> int | None:
        """The limit of the answer; None: as long as there is room."""
        raise NotImplementedError

    @property
    def wanted_logprobs(self) -> int | None:
        """Alternatives per token; None: no log-probabilities."""
        raise NotImplementedError


class ChatRequest(ChatSampling):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1 << 14)]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None
    tools: ToolList | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Annotated[str, Field(max_length=32)] | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=32)] | None = Field(
        None, description="Arguments of the model's chat template, such as enable_thinking."
    )

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def own_names(self) -> Mapping[str, str]:
        newer = {} if self.max_completion_tokens is None else {"max_tokens": "max_completion_tokens"}
        return {**newer, "logprobs": "top_logprobs"}

    @property
    def template_arguments(self) -> dict[str, Any]:
        """Raises `RequestError` for one that no template may be given."""
        check_arguments(self.chat_template_kwargs or {})
        return thinking_arguments(self.reasoning_effort) | (self.chat_template_kwargs or {})


class TokenizeRequest(BaseModel):
    """`POST /tokenize`: of a text or of a conversation."""

    prompt: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=1 << 14)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True


class DetokenizeRequest(BaseModel):
    """`POST /detokenize`."""

    tokens: TokenIds
    skip_special_tokens: bool = False


def thinking_arguments(effort: str | None) -> dict[str, Any]:
    """What chat templates call OpenAI's `reasoning_effort`."""
    if effort is None:
        return {}
    return {"reasoning_effort": effort} | ({"enable_thinking": False} if effort == "none" else {})


def as_spoken(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates know them: the developer is who was the system, a refusal is what was said."""
    spoken = []
    for message in messages:
        fields = message.model_dump(exclude_none=True)
        if fields["role"] == "developer":
            fields["role"] = "system"
        if "content" not in fields and isinstance(fields.get("refusal"), str):
            fields["content"] = fields["refusal"]
        spoken.append(fields)
    return spoken


def _biases(given: dict[str, float] | None) -> dict[int, float] | None:
    if given is None:
        return None
    try:
        return {int(token): bias for token, bias in given.items()}
    except ValueError:
        raise RequestError("logit_bias", "logit_bias must map token ids to numbers") from None
