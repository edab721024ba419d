"""Structures at work: compiled once, then one matcher per continuation says which tokens may come next."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import replace
from typing import Any

from statewise.engine.structure import Structure
from statewise.engine.tokenizer import Tokenizer
from statewise.errors import RequestError

MAX_KEPT = 64  # compiled structures
MAX_KEPT_CHARACTERS = 1 << 20  # of their sources
MAX_REASON = 200  # characters of what the compiler says
BURST_S = 0.25  # processor time that following one continuation may take; ordinary structures take 1 ms at once
TOKEN_S = 0.002  # of which every token gives so much back
NAMES = {
    "json_object": "JSON object",
    "json_schema": "JSON schema",
    "regex": "regular expression",
    "choice": "choice",
    "grammar": "grammar",
}
# Between two elements of JSON: else a model that has not learnt JSON likes to go on with empty lines for ever.
WHITESPACE = "( |\\n {0,24})?"
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_items_in_row": 2_000,
    "max_lexer_states": 250_000,
    "max_grammar_size": 500_000,
    "precompute_large_lexemes": False,
    "verbose_errors": False,
}


class Compiler:
    """Structures to llguidance's matchers, for one vocabulary."""

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_ids: list[int]) -> None:
        """Raises `RequestError` where llguidance is missing or does not know such a tokenizer."""
        try:
            import llguidance
        except ImportError:
            raise RequestError(
                "structure", "structured output needs the package llguidance: pip install 'statewise[server]'"
            ) from None
        self._library = llguidance
        literal, special = _literal(tokenizer_json)
        self._control = sum(1 << token for token in special.difference(eos_ids))
        try:
            self._tokenizer = llguidance.LLTokenizer(literal, n_vocab=vocab_size, eos_token=eos_ids)
        except Exception as error:  # the library raises ValueError and bare Exception
            raise RequestError(
                "structure", f"this model's tokenizer allows no structured output: {_line(error)}"
            ) from None

    def compile(self, structure: Structure) -> Any:
        """A matcher at its beginning. Raises `RequestError`. May hang or end the process: see `GrammarTrial`."""
        try:
            matcher = self._library.LLMatcher(
                self._tokenizer,
                self._grammar(structure),
                log_level=0,
                limits=self._library.LLParserLimits(**LIMITS),
            )
            problem = matcher.get_error() if matcher.is_error() else ""
        except Exception as error:
            problem = str(error) or type(error).__name__
        if problem:
            raise RequestError(structure.field, f"the {NAMES[structure.kind]} cannot be followed: {_line(problem)}")
        return matcher

    def control(self, structure: Structure) -> int:
        """One bit for each token that an answer may not have though its grammar names the id: `<[4]>`."""
        return self._control if structure.kind == "grammar" else 0

    def _grammar(self, structure: Structure) -> str:
        new, value = self._library.LLMatcher, structure.value
        if structure.kind == "regex":
            return str(new.grammar_from_regex(value))
        if structure.kind == "grammar":
            return str(new.grammar_from_lark(value))
        if structure.kind == "choice":
            strings = (json.dumps(one, ensure_ascii=False).replace("\x7f", "\\u007f") for one in json.loads(value))
            return str(new.grammar_from_lark(f"start: {' | '.join(strings)}"))
        schema = {"": '{"type": "object"}', "true": "{}"}.get(value, value)
        return str(new.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITESPACE}))


class Matcher:
    """Where one continuation stands in its structure."""

    def __init__(self, matcher: Any, control: int, structure: Structure, tokenizer: Tokenizer) -> None:
        self._matcher, self._control = matcher, control
        self.field = structure.field  # of the request, which asked for it
        self._left_s = BURST_S
        self._after = structure.after  # what the text has to hold before the structure begins; empty: it has begun
        self._tokenizer = tokenizer
        self._tail = ""

    @property
    def begun(self) -> bool:
        """Whether the structure has begun: until then any text may come, but no end."""
        return not self._after

    @property
    def complete(self) -> bool:
        """Whether nothing can follow."""
        return self.begun and bool(self._matcher.is_stopped())

    def allowed(self) -> bytes:
        """One bit per token id that may come next, the lowest bit first. Raises `RequestError`."""
        begin = time.thread_time()
        mask: bytes = self._matcher.compute_bitmask()
        self._check(begin)
        if self._control:
            mask = (int.from_bytes(mask, "little") & ~self._control).to_bytes(len(mask), "little")
        return mask

    def take(self, token: int) -> None:
        """Go on behind a token that was allowed. Raises `RequestError`."""
        if self._after:
            self._tail = self._tail[-len(self._after) :] + self._tokenizer.decode([token], skip_special_tokens=False)
            if self._after in self._tail:
                self._after = ""
            return
        if not self._matcher.is_stopped():
            begin = time.thread_time()
            self._matcher.consume_token(token)
            self._left_s = min(self._left_s + TOKEN_S, BURST_S)
            self._check(begin)

    def _check(self, begin: float) -> None:
        """The compiler's limits allow an ambiguous grammar half a second for a token, which all requests would wait."""
        self._left_s -= time.thread_time() - begin
        if self._matcher.is_error() or self._left_s < 0:
            reason = "the structure of the answer has become too complex to follow; make it simpler"
            raise RequestError(self.field, reason)


class CompiledStructure:
    """A structure that is known to compile, for any number of continuations."""

    def __init__(self, structure: Structure, matcher: Any, control: int, tokenizer: Tokenizer) -> None:
        self.structure = structure
        self._matcher, self._control, self._tokenizer = matcher, control, tokenizer

    def matcher(self, field: str) -> Matcher:
        """One at its beginning, for a request that asked for it in `field`."""
        structure = replace(self.structure, field=field)
        return Matcher(self._matcher.deep_copy(), self._control, structure, self._tokenizer)


class Grammars:
    """The structures of one model: each is tried out in another process, compiled here, and kept for a while.

    Safe to use from several threads.
    """

    def __init__(self, tokenizer: Tokenizer | None, eos_ids: frozenset[int]) -> None:
        self._tokenizer, self._eos_ids = tokenizer, eos_ids
        self._kept: OrderedDict[Structure, CompiledStructure] = OrderedDict()
        self._lock = threading.Lock()
        self._compiler: Compiler | None = None
        self._trial: Any = None

    def compile(self, structure: Structure) -> CompiledStructure:
        """Raises `RequestError` for what cannot be followed, or not be compiled in time."""
        if self._tokenizer is None:
            raise RequestError("structure", "structured output needs a tokenizer, which this checkpoint does not have")
        kept = self.kept(structure)
        if kept is not None:
            return kept
        compiler, trial = self._prepare()
        trial.run(structure)
        matcher = compiler.compile(structure)
        compiled = CompiledStructure(structure, matcher, compiler.control(structure), self._tokenizer)
        with self._lock:
            self._kept[structure] = compiled
            while len(self._kept) > MAX_KEPT or sum(len(one.value) for one in self._kept) > MAX_KEPT_CHARACTERS:
                self._kept.popitem(last=False)
        return compiled

    def kept(self, structure: Structure) -> CompiledStructure | None:
        """What is compiled already."""
        with self._lock:
            if structure in self._kept:
                self._kept.move_to_end(structure)
            return self._kept.get(structure)

    def warm_up(self) -> None:
        """Start what the first structure would wait for, if structures can be followed at all."""
        with suppress(RequestError):  # the first request is told
            self._prepare()

    def close(self) -> None:
        with self._lock:
            trial, self._trial = self._trial, None
        if trial is not None:
            trial.close()

    def _prepare(self) -> tuple[Compiler, Any]:
        from statewise.engine.grammar_trial import GrammarTrial

        with self._lock:
            if self._compiler is None or self._trial is None:
                if self._tokenizer is None:
                    raise RequestError("structure", "structured output needs a tokenizer")
                size = self._tokenizer.vocab_size  # a configuration may name an end beyond it
                vocabulary = (self._tokenizer.to_json(), size, sorted(one for one in self._eos_ids if one < size))
                self._compiler = self._compiler or Compiler(*vocabulary)
                self._trial = GrammarTrial(*vocabulary)
            return self._compiler, self._trial


def _literal(tokenizer_json: str) -> tuple[str, set[int]]:
    """The tokenizer with secret spellings of its special tokens, and their ids.

    Text that a structure prescribes is tokenized, and would otherwise become a special token where it spells one.
    """
    data = json.loads(tokenizer_json)
    special = [token for token in data.get("added_tokens", ()) if token["special"]]
    secret = secrets.token_hex(16)
    names = {token["content"]: f"{secret}-{token['id']}" for token in special}
    for token in special:
        token["content"] = names[token["content"]]
    model = data["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(text, text): token_id for text, token_id in vocabulary.items()}
    else:  # pieces and their scores
        model["vocab"] = [[names.get(text, text), *more] for text, *more in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    return json.dumps(data), {token["id"] for token in special}


def _line(problem: object) -> str:
    """The line of a message that says most: the cause, where one is named."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()] or ["it is invalid"]
    causes = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (causes or lines)[0].split("; following special tokens")[0][:MAX_REASON]  # their spellings are no help
