"""`LLM`: a model in this process, for Python programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import torch

from statewise.api.model_summary import ModelSummary
from statewise.api.selection import log_selection
from statewise.api.session import Session
from statewise.api.summary import summarize
from statewise.config import EngineConfig
from statewise.engine.engine import Engine
from statewise.engine.request import Delta, Request, RequestOutput
from statewise.engine.sampling_params import SamplingParams, check_token_ids
from statewise.engine.tokenizer import Tokenizer, end_token_ids
from statewise.errors import ConfigError, RequestError, SnapshotError
from statewise.memory.checkpoint import Checkpoint
from statewise.memory.sharding import cut, gather
from statewise.memory.snapshot import Snapshot, read_snapshot, write_snapshot
from statewise.memory.snapshot_format import Identity, layout_of
from statewise.memory.snapshot_transcript import Transcript
from statewise.models.directory import model_directory
from statewise.models.identity import model_identity
from statewise.models.registry import build, read_model_config, resolve_dtype
from statewise.models.weights import Progress, load_weights

Message: TypeAlias = Mapping[str, Any]
Prompt: TypeAlias = str | Mapping[str, Any] | Sequence[Message]
"""Text, `{"prompt_token_ids": [...]}`, or the messages of a conversation."""

MAX_PROMPT_CHARACTERS = 1 << 26
MESSAGES_EXPECTED = "messages must be a non-empty list of {'role', 'content'} objects"


class LLM:
    """A checkpoint loaded into an engine.

    `model` is a directory or `demo`. `dtype` is `auto` (the checkpoint's, where the processor is good at it),
    `float32` or `bfloat16`. `max_prefill_tokens` bounds the prompt tokens of one step, `max_running` the sequences
    that run at once. `num_records` and `num_pages` size the two pools; None sizes them from the memory there is.
    `page_size` is in tokens; `max_length` caps prompt and answer together. `prefix_cache` keeps the memory of
    prompts and turns, so that a prompt that begins like an earlier one is computed from there on. What the pools
    have no room for moves to `host_cache` bytes of memory (None: as much as the pools have, on a CPU for preempted
    sequences only; 0: none) and from there into the directory `disk_cache`, up to `disk_cache_bytes`, where a later
    engine finds it. `overrides` replaces keys of the checkpoint's config.json: `{"slope_formula": "hf"}`,
    `{"replace_layers": {"registered_name": "another"}}`.

    Raises `CheckpointError` for a checkpoint that cannot be served and `ConfigError` for an option out of range.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        max_prefill_tokens: int = 2048,
        max_running: int = 64,
        num_records: int | None = None,
        num_pages: int | None = None,
        page_size: int = 64,
        max_length: int | None = None,
        prefix_cache: bool = True,
        host_cache: int | None = None,
        disk_cache: str | Path | None = None,
        disk_cache_bytes: int = 10 << 30,
        overrides: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> None:
        directory = model_directory(model)
        model_class, config, values = read_model_config(directory, overrides)
        _check_range("max_prefill_tokens", max_prefill_tokens, 1, 1 << 20)
        _check_range("max_running", max_running, 1, 4096)
        _check_range("page_size", page_size, 1, 4096)
        for name, value in (("num_records", num_records), ("num_pages", num_pages), ("max_length", max_length)):
            if value is not None:
                _check_range(name, value, 1, 1 << 31)
        _check_range("disk_cache_bytes", disk_cache_bytes, 1, 1 << 60)
        if host_cache is not None:
            _check_range("host_cache", host_cache, 0, 1 << 60)
        engine_config = EngineConfig(
            dtype=resolve_dtype(dtype, values),
            device=_resolve_device(device),
            page_size=page_size,
            conv_channels_last=True,  # the order in which the CPU's kernels read it
            max_prefill_tokens=max_prefill_tokens,
            max_running=max_running,
            max_length=max_length or 0,
            prefix_cache=prefix_cache,
            host_cache=host_cache,
            disk_cache=None if disk_cache is None else Path(disk_cache),
            disk_cache_bytes=disk_cache_bytes,
            identity="" if disk_cache is None else repr(model_identity(directory, overrides)),
            num_records=num_records or 0,
            num_pages=num_pages or 0,
        )
        self.name = str(model)
        self._directory, self._overrides = directory, overrides
        self.tokenizer = Tokenizer.from_directory(directory)
        eos_ids = self.tokenizer.eos_ids if self.tokenizer else end_token_ids(directory)
        module = build(model_class, config, engine_config)
        self._summary = summarize(self.name, directory, values, module, engine_config)
        log_selection(self._summary)
        load_weights(module, directory, engine_config.device, progress)
        self.config = config
        self.engine = Engine(module, engine_config, self.tokenizer, eos_ids)
        self.engine.warm_up()

    # Generation

    def generate(
        self,
        prompts: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Continue one prompt or a list of prompts, in one batch. Results are in the order of the prompts.

        `params` is one for all or one for each. A prompt that cannot be served raises `RequestError` before
        anything runs; a request that fails later has `error` set.
        """
        _require_sequence("prompts", prompts, "text, token ids or a list of them")
        single = isinstance(prompts, str | Mapping)
        return self._run([prompts] if single else list(prompts), params)  # type: ignore[list-item]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or a list of conversations (`[{"role": "user", "content": "..."}]` each)."""
        if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
            raise RequestError("messages", MESSAGES_EXPECTED)
        single = isinstance(messages[0], Mapping)
        return self._run([messages] if single else list(messages), params, chat=True)  # type: ignore[list-item]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Delta]:
        """Yield what each step adds to the answer. The last delta of the request carries its `output`.

        The request is queued when the first delta is asked for; closing the iterator early aborts it.
        """
        if params is not None and params.copies > params.n:
            raise RequestError("best_of", "best_of cannot be streamed, its best is known at the end: use n")
        request = self._add(prompt, params or SamplingParams())
        try:
            while True:
                while request.deltas:
                    yield request.deltas.popleft()
                if request.finished:
                    return
                self.engine.step()
        finally:
            self.engine.abort(request)

    def session(self, salt: str | None = None) -> Session:
        """A conversation that can be frozen, forked and rewound. Sessions of one `salt` share their memory."""
        return Session(self, salt)

    def load_session(self, path: str | Path, salt: str | None = None) -> Session:
        """A session from a file that `Session.save` wrote, with its turns, names and messages. Nothing is computed.

        A file without those gives a session of one turn. Raises `SnapshotError` for a file that is damaged, newer, or
        of another model, before a byte of it is used.
        """
        records, pages, config = self.engine.runner.records.spec, self.engine.runner.pages.spec, self.engine.config
        sizes = {"vocab_size": self.engine.vocab_size, "hidden_size": self.config.hidden_size}
        snapshot = read_snapshot(Path(path), self._identity, records, pages, config.max_length, **sizes)
        tokens, hidden = list(snapshot.tokens), snapshot.hidden
        if hidden is None or not tokens:
            missing = "last hidden row" if tokens else "token"
            raise SnapshotError(f"{Path(path).name!r} has no {missing}, which a session needs")
        checkpoint = cut(snapshot.tensors, len(tokens), records, pages, 0, 1)
        self.engine.bring(salt, tokens, checkpoint, hidden)
        return Session(self, salt, tokens, snapshot.transcript)

    def write_session(
        self, path: Path, tokens: list[int], transcript: Transcript, checkpoint: Checkpoint, hidden: torch.Tensor
    ) -> int:
        """Write tokens and the memory behind them; returns the file's bytes. Use `Session.save`."""
        records, pages = self.engine.runner.records.spec, self.engine.runner.pages.spec
        tensors = gather([checkpoint], records, pages)
        created = datetime.now(UTC).isoformat(timespec="seconds")
        layout = layout_of(records, pages)
        name = self._directory.resolve().name  # not its path, which concerns nobody else
        snapshot = Snapshot(self._identity, layout, tuple(tokens), tensors, hidden, name, created, transcript)
        return write_snapshot(path, snapshot)

    @cached_property
    def _identity(self) -> Identity:
        return model_identity(self._directory, self._overrides)

    def close(self) -> None:
        """End all requests and write to `disk_cache` what is worth it. The model cannot be used afterwards."""
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def check_ids(self, token_ids: Any) -> list[int]:
        """Token ids of the vocabulary as a list. Raises `RequestError`."""
        ids = _token_ids(token_ids)
        check_token_ids("token_ids", ids, self.engine.vocab_size)
        return ids

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Logits [T, vocab] fp32 of every position of `token_ids`, by the engine's own prefill path."""
        params = SamplingParams(temperature=0, max_tokens=0)
        request = self.engine.add(None, _token_ids(token_ids), params, keep_prompt_logits=True)
        self._finish([request])
        if request.prompt_logits is None:
            raise RequestError("token_ids", request.error or "the request was aborted")
        return request.prompt_logits

    def summary(self) -> ModelSummary:
        """What the model is made of and how much its state takes, with the sizes of this engine's pools."""
        config = self.engine.config
        return replace(
            self._summary,
            max_length=config.max_length,
            num_records=config.num_records,
            num_pages=config.num_pages,
        )

    # From prompts to requests

    def _run(
        self, prompts: list[Prompt], params: SamplingParams | Sequence[SamplingParams] | None, chat: bool = False
    ) -> list[RequestOutput]:
        each = [params or SamplingParams()] * len(prompts) if not isinstance(params, Sequence) else list(params)
        if len(each) != len(prompts):
            raise RequestError(
                "params", f"{len(each)} sampling parameters for {len(prompts)} prompts; give one or each"
            )
        requests: list[Request] = []
        try:
            for prompt, own in zip(prompts, each, strict=True):
                if chat and isinstance(prompt, str | Mapping):
                    raise RequestError("messages", MESSAGES_EXPECTED)
                requests.append(self._add(prompt, own))
        except BaseException:
            self._abort(requests)
            raise
        self._finish(requests)
        return [request.output() for request in requests]

    def _add(self, prompt: Prompt, params: SamplingParams) -> Request:
        if not isinstance(params, SamplingParams):
            raise RequestError("params", f"params must be a SamplingParams, found {type(params).__name__}")
        text, token_ids = self._encode(prompt)
        return self.engine.add(text, token_ids, params)

    def _encode(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            return None, _token_ids(prompt.get("prompt_token_ids"))
        if self.tokenizer is None:
            raise RequestError("prompt", "this checkpoint has no tokenizer.json; give the prompt as token ids")
        if isinstance(prompt, str):
            if len(prompt) > MAX_PROMPT_CHARACTERS:
                raise RequestError("prompt", f"the prompt is longer than {MAX_PROMPT_CHARACTERS} characters")
            return prompt, self.tokenizer.encode(prompt)
        _require_sequence("prompt", prompt, "text, token ids or messages")
        return None, self.tokenizer.encode_chat(list(prompt))

    def _finish(self, requests: list[Request]) -> None:
        try:
            while not all(request.finished for request in requests):
                self.engine.step()
        except BaseException:
            self._abort(requests)
            raise

    def _abort(self, requests: list[Request]) -> None:
        for request in requests:
            self.engine.abort(request)


def _require_sequence(name: str, value: object, expected: str) -> None:
    if not isinstance(value, Sequence | Mapping):
        raise RequestError(name, f"{name} must be {expected}, found {type(value).__name__}")


def _token_ids(ids: Any) -> list[int]:
    """Token ids from any sequence of integers, NumPy's and torch's included."""
    if ids is None or isinstance(ids, str | Mapping) or not hasattr(ids, "__iter__"):
        raise RequestError("prompt", 'token ids must be a list of integers, in a prompt {"prompt_token_ids": [...]}')
    return [token if isinstance(token, bool) or not hasattr(token, "__index__") else int(token) for token in ids]


def _resolve_device(device: str | torch.device) -> torch.device:
    if str(device) not in ("auto", "cpu"):
        raise ConfigError(f"device '{device}' is not supported by this version; choose auto or cpu")
    return torch.device("cpu")


def _check_range(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name} must be an integer from {low} to {high}, found {value!r}")
