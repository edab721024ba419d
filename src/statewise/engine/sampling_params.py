"""What a request may ask of the sampler, checked before anything else sees it. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from statewise.engine.structure import Structure
from statewise.errors import RequestError

MAX_COPIES = 128
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256
MAX_KEPT_TOKENS = 64
MAX_KEPT_CHARACTERS = 256
MAX_LOGPROBS = 20
MAX_BIASES = 1024
MAX_BREAKPOINTS = 64
MAX_TOKENS = 1 << 30
TINY = 1e-30  # less than this is 0 where denormals are flushed, and so to the engine but not to whoever asks it


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt. Every field is bounds-checked; `RequestError` names the field and the limit.

    The order of operations on the logits is: penalties and `logit_bias`, `temperature`, `top_k`, `top_p`, `min_p`.
    """

    temperature: float = 1.0  # 0: the most likely token
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    min_p: float = 0.0  # relative to the most likely token
    repetition_penalty: float = 1.0  # divides positive and multiplies negative logits of tokens seen so far
    presence_penalty: float = 0.0  # subtracted once for every generated token
    frequency_penalty: float = 0.0  # subtracted for every occurrence of a generated token
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None  # the same seed gives the same text, whatever else is in the batch
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int = 256
    n: int = 1  # independent continuations
    best_of: int | None = None  # so many are made, and the n whose tokens are likeliest on average are given
    logprobs: int | None = None  # alternatives per generated token; the chosen one is always given
    cache_salt: str | None = None  # requests share frozen prompts with those of the same salt only
    cache_breakpoints: Sequence[int] = ()  # token positions of the prompt to freeze, beside those chosen by itself
    prompt_logprobs: int | None = None
    return_logits: bool = False
    skip_special_tokens: bool = True
    kept_special_tokens: Sequence[str] = ()  # that stay in the text although skip_special_tokens leaves out the others
    structure: Structure | None = None  # the form that the answer must have
    _stops: tuple[str, ...] = field(init=False, repr=False, compare=False, default=())

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _integer("top_k", self.top_k, 0, 1 << 31)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _integer("min_tokens", self.min_tokens, 0, MAX_TOKENS)
        _integer("max_tokens", self.max_tokens, 0, MAX_TOKENS)
        _integer("n", self.n, 1, MAX_COPIES)
        if self.best_of is not None:
            _integer("best_of", self.best_of, self.n, MAX_COPIES)
        if self.min_tokens > self.max_tokens:
            raise RequestError("min_tokens", f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}")
        if self.seed is not None:
            _integer("seed", self.seed, 0, (1 << 63) - 1)
        for name, value in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if value is not None:
                _integer(name, value, 0, MAX_LOGPROBS)
        for name in ("include_stop_str_in_output", "ignore_eos", "return_logits", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(name, f"{name} must be true or false, found {getattr(self, name)!r}")
        if self.structure is not None and not isinstance(self.structure, Structure):
            raise RequestError("structure", "structure must be a Structure, such as Structure.json_object()")
        self._check_stops()
        self._check_kept()
        self._check_biases()
        self._check_breakpoints()

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return self._stops

    @property
    def copies(self) -> int:
        """How many continuations are made."""
        return self.best_of or self.n

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None or self.copies > self.n

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5  # dividing by less would overflow

    @property
    def truncates(self) -> bool:
        """Whether unlikely tokens are excluded before one is drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def edits_logits(self) -> bool:
        """Whether the logits must be changed before a token is chosen (apart from temperature and truncation)."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        structured = self.structure is not None
        return structured or penalties != (1.0, 0.0, 0.0) or bool(self.logit_bias) or self.min_tokens > 0

    def _check_stops(self) -> None:
        for name, value in (("stop", self.stop or ()), ("stop_token_ids", self.stop_token_ids)):
            if not isinstance(value, Sequence):
                raise RequestError(name, f"{name} must be a list, found {value!r}")
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stops) > MAX_STOP_STRINGS:
            raise RequestError("stop", f"stop holds {len(stops)} strings, at most {MAX_STOP_STRINGS} are allowed")
        for stop in stops:
            if not isinstance(stop, str) or not 1 <= len(stop) <= MAX_STOP_CHARACTERS:
                raise RequestError("stop", f"each stop string must have 1 to {MAX_STOP_CHARACTERS} characters")
        object.__setattr__(self, "_stops", stops)
        if len(self.stop_token_ids) > MAX_BIASES:
            raise RequestError("stop_token_ids", f"stop_token_ids holds more than {MAX_BIASES} ids")
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0, 1 << 31)

    def _check_kept(self) -> None:
        kept = self.kept_special_tokens
        if not isinstance(kept, list | tuple) or len(kept) > MAX_KEPT_TOKENS:
            raise RequestError(
                "kept_special_tokens", f"kept_special_tokens must be a list of at most {MAX_KEPT_TOKENS} strings"
            )
        for one in kept:
            if not isinstance(one, str) or not 1 <= len(one) <= MAX_KEPT_CHARACTERS:
                raise RequestError(
                    "kept_special_tokens",
                    f"each of kept_special_tokens must be a string of 1 to {MAX_KEPT_CHARACTERS} characters",
                )

    def _check_breakpoints(self) -> None:
        if not isinstance(self.cache_breakpoints, list | tuple):
            raise RequestError("cache_breakpoints", "cache_breakpoints must be a list of token positions")
        if len(self.cache_breakpoints) > MAX_BREAKPOINTS:
            raise RequestError("cache_breakpoints", f"cache_breakpoints holds more than {MAX_BREAKPOINTS} positions")
        for position in self.cache_breakpoints:
            _integer("cache_breakpoints", position, 1, MAX_TOKENS)

    def _check_biases(self) -> None:
        if self.logit_bias is None:
            return
        if not isinstance(self.logit_bias, Mapping) or len(self.logit_bias) > MAX_BIASES:
            raise RequestError("logit_bias", f"logit_bias must map at most {MAX_BIASES} token ids to numbers")
        for token, bias in self.logit_bias.items():
            _integer("logit_bias", token, 0, 1 << 31)
            _number("logit_bias", bias, -100.0, 100.0)


def check_token_ids(name: str, ids: list[int], vocab_size: int) -> None:
    """Raise `RequestError` for an id outside the vocabulary."""
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise RequestError(name, f"{name}: token id {token!r} is outside the vocabulary of {vocab_size} tokens")


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(name, f"{name} must be an integer from {low} to {high}, found {value!r}")


def _number(name: str, value: object, low: float, high: float, open_low: bool = False) -> None:
    valid = isinstance(value, int | float) and not isinstance(value, bool) and value == value
    if not valid or not low <= value <= high or (open_low and value < low + TINY):  # type: ignore[operator]
        above = "above" if open_low else "from"
        until = "and at most" if open_low else "to"
        raise RequestError(name, f"{name} must be a number {above} {low} {until} {high}, found {value!r}")
