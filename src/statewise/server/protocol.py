"""The requests of OpenAI's API, with the additions that clients of other servers send, and ours for sessions.

Sizes are bounded here; what the numbers may be, `SamplingParams` says. Unknown fields are ignored, as OpenAI's own
clients expect of a server that is older than they are.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from statewise.engine.sampling_params import SamplingParams
from statewise.errors import RequestError

MAX_ITEMS = 1 << 20
TokenIds = Annotated[list[int], Field(max_length=1 << 24)]
Text = Annotated[str, Field(max_length=1 << 24)]


class StreamOptions(BaseModel):
    """What a stream carries beside its text."""

    include_usage: bool = False


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
    logit_bias: Annotated[dict[str, float], Field(max_length=1024)] | None = None
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
            "seed": self.seed,
            "stop": self.stop,
            "stop_token_ids": self.stop_token_ids,
            "min_tokens": self.min_tokens,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "logit_bias": _biases(self.logit_bias),
            "cache_breakpoints": self.cache_breakpoints,
            **more,
        }
        return SamplingParams(
            max_tokens=max_tokens,
            cache_salt=salt,
            include_stop_str_in_output=self.include_stop_str_in_output,
            ignore_eos=self.ignore_eos,
            skip_special_tokens=self.skip_special_tokens,
            **{name: value for name, value in given.items() if value is not None},
        )


class CompletionRequest(Sampling):
    """`POST /v1/completions`."""

    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=128)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=128)]
    ) = Field(description="Text, token ids, or a list of either.")
    max_tokens: int | None = 16
    logprobs: int | None = None
    echo: bool | None = False
    best_of: int | None = None
    suffix: str | None = Field(None, max_length=1 << 20)


class Message(BaseModel):
    """One message of a conversation, as the chat template gets it."""

    model_config = ConfigDict(extra="allow")

    role: Annotated[str, Field(max_length=64)]
    content: Any = None


class ResponseFormat(BaseModel):
    """What the answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None


class ChatRequest(Sampling):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1 << 14)]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=128)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=32)] | None = None


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


def _biases(given: dict[str, float] | None) -> dict[int, float] | None:
    if given is None:
        return None
    try:
        return {int(token): bias for token, bias in given.items()}
    except ValueError:
        raise RequestError("logit_bias", "logit_bias must map token ids to numbers") from None
