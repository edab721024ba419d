"""What the routes answer, as the OpenAPI document describes it. Nothing here runs when a request is answered."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class ErrorDetail(BaseModel):
    """What was wrong. `param` is the field at fault, `code` a word that does not change."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    error: ErrorDetail


class PromptTokensDetails(BaseModel):
    cached_tokens: int  # whose state was there already


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: int | str | None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class FunctionCall(BaseModel):
    name: str
    arguments: str


class ToolCall(BaseModel):
    id: str
    type: Literal["function"]
    function: FunctionCall


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: int | str | None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: PromptTokensDetails
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class ResponseObject(BaseModel):
    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete", "failed", "in_progress"]
    model: str
    output: list[dict[str, Any]]
    usage: ResponseUsage | None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class Tokens(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int | None


class Detokenized(BaseModel):
    prompt: str


class TokenizerInfo(BaseModel):
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None
    model_max_length: int | None
    vocab_size: int


class Health(BaseModel):
    status: str


class Ready(BaseModel):
    ready: bool
    engine: str


class Version(BaseModel):
    version: str


class Checkpoint(BaseModel):
    """A place whose state is kept. `tier` is where: the pools, host memory or the disk."""

    num_tokens: int
    bytes: int
    tier: str
    names: list[str]


class Session(BaseModel):
    """A conversation that the server keeps. `turns` and `checkpoints` are positions in tokens."""

    id: str
    object: Literal["session"]
    created: int
    parent: str | None
    num_tokens: int
    bytes: int
    turns: list[int]
    spoken: list[int]
    checkpoints: dict[str, int]
    messages: list[dict[str, Any]]
    tree: list[Checkpoint]


class SessionItem(BaseModel):
    id: str
    object: Literal["session"]
    num_tokens: int
    parent: str | None


class SessionList(BaseModel):
    object: Literal["list"]
    data: list[SessionItem]


class Forks(BaseModel):
    object: Literal["list"]
    data: list[Session]


class SessionDeleted(BaseModel):
    id: str
    object: Literal["session.deleted"]
    deleted: bool


class Free(BaseModel):
    """Figures whose names the route's own text tells."""

    object: str
