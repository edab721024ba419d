"""The step loop: scheduler, runner, sampler, and the bookkeeping of what each request gets."""

from __future__ import annotations

import itertools
import logging
import random
import threading
import time
from typing import Any

import torch
from torch import Tensor

from statewise.config import EngineConfig
from statewise.engine.grammar import CompiledStructure, Grammars
from statewise.engine.request import Completion, Delta, FinishReason, Request, RequestMetrics, Sequence
from statewise.engine.runner import LOGITS_BLOCK, Runner
from statewise.engine.sampler import Sampled, Sampler, one_logprob
from statewise.engine.sampling_params import SamplingParams, check_token_ids
from statewise.engine.scheduler import Scheduler, Work
from statewise.engine.stop import StopMatcher
from statewise.engine.tokenizer import Tokenizer
from statewise.errors import RequestError, StatewiseError
from statewise.memory.cache import tenant_of
from statewise.memory.checkpoint import Checkpoint

logger = logging.getLogger(__name__)
SEED_STEP = 1_000_003  # separates the random streams of the n continuations of one request
WARM_UP_TOKENS = 3
CHECK_INTERVAL_S = 1.0  # between two checks of the pools, which an idle engine makes


class Engine:
    """Continuous batching over one model. `step` may be called from any thread; calls are serialised."""

    def __init__(self, model: Any, config: EngineConfig, tokenizer: Tokenizer | None, eos_ids: frozenset[int]) -> None:
        self.runner = Runner(model, config)
        self.config = self.runner.config
        self.tokenizer = tokenizer
        self.eos_ids = eos_ids
        self.vocab_size: int = model.config.vocab_size
        usable = min(self.vocab_size, tokenizer.vocab_size) if tokenizer else self.vocab_size
        self.sampler = Sampler(usable, eos_ids, model.blank_ids())
        interior = all(mixer.capabilities.interior_states for mixer in model.mixers)
        self.scheduler = Scheduler(self.config, self.runner.checkpoints(), interior)
        self.requests: dict[str, Request] = {}
        self._numbers = itertools.count()
        self._lock = threading.RLock()
        self._checked = 0.0  # when the pools were last checked
        self.computed_tokens = 0  # that passed the model since the start
        self.grammars = Grammars(tokenizer, eos_ids)

    # Requests

    def add(
        self,
        prompt: str | None,
        token_ids: list[int],
        params: SamplingParams,
        *,
        keep_prompt_logits: bool = False,
        structure: CompiledStructure | None = None,
    ) -> Request:
        """Queue a prompt. Raises `RequestError` when it cannot be served; nothing else is touched then.

        `structure` is that of `params` where it is compiled already; otherwise it is compiled here.
        """
        limit = self.config.max_length
        if not token_ids:
            raise RequestError("prompt", "the prompt is empty: it must have at least one token")
        room = limit - len(token_ids)
        if room < (1 if params.max_tokens else 0):
            raise RequestError(
                "prompt",
                f"This model's maximum context length is {limit} tokens. However, your prompt contains "
                f"{len(token_ids)} input tokens; reduce the length of the input prompt.",
            )
        check_token_ids("prompt", token_ids, self.vocab_size)
        check_token_ids("logit_bias", list(params.logit_bias or ()), self.sampler.vocab_size)
        furthest = max(params.cache_breakpoints, default=0)
        if furthest > len(token_ids):
            raise RequestError(
                "cache_breakpoints", f"cache_breakpoints names token {furthest} of a prompt of {len(token_ids)}"
            )
        if params.stop_strings and self.tokenizer is None:
            raise RequestError("stop", "stop strings need a tokenizer, which this checkpoint does not have")
        if params.structure is not None and structure is None:
            structure = self.grammars.compile(params.structure)
        with self._lock:
            request = Request(
                request_id=f"request-{next(self._numbers)}",
                prompt=prompt,
                prompt_token_ids=token_ids,
                params=params,
                max_tokens=min(params.max_tokens, room),
                keep_prompt_logits=keep_prompt_logits,
                tenant=tenant_of(params.cache_salt),
                arrival=time.perf_counter(),
                metrics=RequestMetrics(prompt_tokens=len(token_ids)),
            )
            request.sequences = [self._sequence(request, index, structure) for index in range(params.copies)]
            self.requests[request.request_id] = request
            # The others are forks of the first one's prompt: they come when that is frozen.
            for sequence in request.sequences[: 1 if self.scheduler.cache.enabled else None]:
                self.scheduler.add(sequence)
            return request

    def _sequence(self, request: Request, index: int, structure: CompiledStructure | None) -> Sequence:
        params = request.params
        stops = StopMatcher(params.stop_strings, params.include_stop_str_in_output)
        return Sequence(
            request=request,
            index=index,
            tokens=list(request.prompt_token_ids),
            completion=Completion(index, logprobs=None if params.logprobs is None else []),
            decoder=None
            if self.tokenizer is None
            else self.tokenizer.stream(params.skip_special_tokens, params.kept_special_tokens),
            stops=stops if params.stop_strings else None,
            random=random.Random(None if params.seed is None else params.seed * SEED_STEP + index),
            matcher=None
            if structure is None or params.structure is None
            else structure.matcher(params.structure.field),
        )

    def abort(self, request: Request) -> None:
        """End a request at once, wherever it is; its blocks are free when this returns."""
        with self._lock:
            for sequence in request.sequences:
                if not sequence.finished:
                    self._finish(sequence, "abort")

    def warm_up(self) -> None:
        """Run a tiny request, so that kernels are compiled or read from their cache before the first real one."""
        if self.config.max_length >= WARM_UP_TOKENS + 2:
            params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, cache_salt="warm-up")
            request = self.add(None, [0] * WARM_UP_TOKENS, params)
            while not request.finished:
                self.step()
            self.scheduler.cache.clear(request.tenant)
            if request.error is not None:
                raise StatewiseError(f"the model loads but does not run on this machine: {request.error}")

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    def check_integrity(self) -> None:
        """Raise `BlockError` when the pools and the sequences disagree."""
        with self._lock:
            self.scheduler.check_integrity()

    def close(self) -> None:
        """End all requests, and leave on the disk what is worth it. The engine cannot be used again."""
        with self._lock:
            for request in list(self.requests.values()):
                self.abort(request)
            self.scheduler.cache.close()
        self.grammars.close()

    # What is frozen

    def frozen(self, salt: str | None, tokens: list[int]) -> list[tuple[int, str]]:
        """The token counts on the way through `tokens` behind which the memory is kept, rising, and in which tier."""
        cache = self.scheduler.cache
        with self._lock:
            points = cache.index.along(tenant_of(salt), tokens)
            return [(point.num_tokens, cache.tier_of(point.value)) for point in points]

    def pin(self, salt: str | None, tokens: list[int], until: float) -> None:
        """Evict the memory behind exactly `tokens` last until a time of the monotonic clock, if there is any."""
        with self._lock:
            point = self.scheduler.cache.index.find(tenant_of(salt), tokens)
            if point is not None:
                point.value.pinned_until = until

    def export(self, salt: str | None, tokens: list[int]) -> tuple[Checkpoint, Tensor]:
        """The memory behind exactly `tokens`, copied to the host, and its last hidden row [hidden].

        Raises `RequestError` if it is not kept.
        """
        with self._lock:
            point = self.scheduler.cache.index.find(tenant_of(salt), tokens)
            checkpoint = None if point is None else self.scheduler.cache.export(point.value)
            if point is None or checkpoint is None:
                raise RequestError("session", "the memory of the session is not kept; raise num_records or num_pages")
            return checkpoint, point.value.hidden

    def bring(self, salt: str | None, tokens: list[int], checkpoint: Checkpoint, hidden: Tensor) -> None:
        """Keep a checkpoint from elsewhere. Raises `RequestError` if there is no room for it."""
        with self._lock:
            if not self.scheduler.cache.enabled:
                raise RequestError("session", "the prefix cache is disabled; open the model with prefix_cache=True")
            if not self.scheduler.cache.bring(tenant_of(salt), tokens, checkpoint, hidden):
                raise RequestError("session", "there is no room for the session; raise num_records or num_pages")

    def memory_of(self, tokens: int) -> int:
        """Bytes of a sequence of so many tokens: one record, and the pages that cover it."""
        pages = self.scheduler.pages_for(tokens)
        return self.runner.records.spec.nbytes + pages * self.runner.pages.spec.nbytes

    # One step

    def step(self) -> bool:
        """Run one forward pass and hand its tokens out. False when there was nothing to do."""
        with self._lock:
            work = self.scheduler.schedule()
            if work:
                self._step(work)
                return True
            waits = bool(self.requests) and self.scheduler.cache.moving
        if waits:  # for what they go on from, which is read from the disk; other requests may come meanwhile
            self.scheduler.cache.wait()
        return waits

    def _step(self, work: list[Work]) -> None:
        now = time.perf_counter()
        for item in work:
            metrics = item.sequence.request.metrics
            if metrics.queue_s is None:
                metrics.queue_s = now - item.sequence.request.arrival
        try:
            self._run(work)
        except Exception as error:
            self.scheduler.drop_freezes()
            self._failed(work, error)
        except BaseException:  # an interrupt may come at any point, also between a state and its count
            self.scheduler.drop_freezes()
            self.scheduler.isolate([item.sequence for item in work])
            raise
        if not self.requests and now - self._checked > CHECK_INTERVAL_S:
            self.scheduler.check_integrity()
            self._checked = now

    def _run(self, work: list[Work]) -> None:
        """The device's part of a step, then every sequence that has caught up gets its token."""
        rows = self._forward(work)
        self._keep_prompts(work, rows)
        complete = [item for item in work if item.count == item.sequence.pending]
        sampled: list[Sampled] = []
        if complete:
            last = [hidden[-1] for item, hidden in zip(work, rows, strict=True) if item.count == item.sequence.pending]
            logits = self.runner.logits(torch.stack(last))
            sampled = self.sampler.sample(logits, [item.sequence for item in complete])
        for item, hidden in zip(work, rows, strict=True):
            sequence = item.sequence
            self.scheduler.freeze_on_the_way(item, hidden)
            sequence.computed += item.count
            self.computed_tokens += item.count
            sequence.hidden = hidden[-1]
            if sequence.computed in sequence.freeze_at:
                self.scheduler.freeze(sequence)
        for row, (item, result) in enumerate(zip(complete, sampled, strict=True)):
            self.scheduler.cleared(item.sequence)
            try:
                self._receive(item.sequence, result, logits[row])
            except Exception as error:
                self._error(item.sequence, error)

    def _forward(self, work: list[Work]) -> list[Tensor]:
        """The hidden rows of each item; of one whose memory was all found frozen, the row that was frozen with it."""
        computed = (
            iter(self.runner.forward([item for item in work if item.count])) if any(w.count for w in work) else iter(())
        )
        return [next(computed) if item.count else item.sequence.hidden[None] for item in work]  # type: ignore[index]

    def _keep_prompts(self, work: list[Work], rows: list[Tensor]) -> None:
        """Of the prompt's rows, keep what the request asked for: whole logits, or log-probabilities."""
        for item, hidden in zip(work, rows, strict=True):
            sequence, request = item.sequence, item.sequence.request
            alternatives = request.params.prompt_logprobs
            if sequence.generated or sequence.index or not request.wants_prompt_rows:
                continue
            if sequence.computed == 0:  # also when the prompt runs again after a failed step
                sequence.prompt_rows, request.prompt_logprobs = [], None if alternatives is None else [None]
            following = request.prompt_token_ids[sequence.computed + 1 : sequence.computed + item.count + 1]
            for block, tokens in zip(hidden.split(LOGITS_BLOCK), _blocks(following), strict=False):
                logits = self.runner.logits(block)
                if request.keep_prompt_logits:
                    sequence.prompt_rows.append(logits)
                if alternatives is not None and request.prompt_logprobs is not None:
                    usable = self.sampler.usable(logits)
                    request.prompt_logprobs += [one_logprob(r, t, alternatives) for r, t in zip(usable, tokens)]

    def _receive(self, sequence: Sequence, sampled: Sampled, logits: Tensor) -> None:
        """Give a sequence its next token."""
        request, params = sequence.request, sequence.params
        if sequence.prompt_rows:
            request.prompt_logits, sequence.prompt_rows = torch.cat(sequence.prompt_rows), []
        if sampled.error is not None:
            request.error_field = sampled.error_field
            self._finish(sequence, "error", error=sampled.error)
            return
        if not sequence.generated:
            self._prompt_done(sequence)
        if request.max_tokens == 0:
            self._finish(sequence, "length")
            return
        token = sampled.token
        now = time.perf_counter()
        if request.first_token is None:
            request.first_token = now
            request.metrics.time_to_first_token_s = now - request.arrival
        request.metrics.decode_s = now - request.first_token
        request.metrics.completion_tokens += 1
        sequence.tokens.append(token)
        sequence.counts[token] += 1
        sequence.completion.token_ids.append(token)
        if sampled.logprob is not None:
            sequence.logprob += sampled.logprob.logprob
            if sequence.completion.logprobs is not None:
                sequence.completion.logprobs.append(sampled.logprob)
        if params.return_logits:
            sequence.logits.append(logits.clone())

        complete = False
        if sequence.matcher is not None:
            try:
                sequence.matcher.take(token)
            except RequestError as error:
                request.error_field = error.field
                self._finish(sequence, "error", error=str(error))
                return
            complete = sequence.matcher.complete
        generated = sequence.generated
        stops_here = token in params.stop_token_ids or (token in self.eos_ids and not params.ignore_eos)
        if stops_here and (complete or generated >= params.min_tokens):
            self._finish(sequence, "stop", stop_reason=token, token=token)
            return
        text, matched = self._text(sequence, token)
        if matched is not None:
            self._finish(sequence, "stop", stop_reason=matched, text=text, token=token)
        elif complete:
            self._finish(sequence, "stop", text=text, token=token)
        elif generated >= request.max_tokens:
            self._finish(sequence, "length", text=text, token=token)
        else:
            sequence.completion.text += text
            request.deltas.append(Delta(sequence.index, text, [token]))

    def _prompt_done(self, sequence: Sequence) -> None:
        """The memory of a prompt is complete: freeze it, and let the request's other continuations go on from it."""
        if self.scheduler.cache.enabled:
            self.scheduler.freeze(sequence)
            if sequence.index == 0:
                self.scheduler.waiting.extendleft(reversed(sequence.request.sequences[1:]))

    def _text(self, sequence: Sequence, token: int) -> tuple[str, str | None]:
        """The text that became certain with `token`, and the stop string that it completed."""
        if sequence.decoder is None:
            return "", None
        text = sequence.decoder.push(token)
        if sequence.stops is None or sequence.generated < sequence.params.min_tokens:
            return text, None
        return sequence.stops.push(text)

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        *,
        stop_reason: int | str | None = None,
        text: str = "",
        token: int | None = None,
        error: str | None = None,
    ) -> None:
        request, completion = sequence.request, sequence.completion
        # What can fail comes first: an error here must still find the sequence unfinished.
        if reason != "error" and not isinstance(stop_reason, str):
            text += self._rest(sequence)
        if sequence.params.return_logits and reason != "error":
            completion.logits = torch.stack(sequence.logits) if sequence.logits else torch.empty(0, self.vocab_size)
        sequence.logits = []
        completion.text += text
        completion.finish_reason, completion.stop_reason = reason, stop_reason
        request.error = request.error or error
        if reason in ("stop", "length") and error is None:
            self.scheduler.freeze(sequence, ends=True)
        else:
            self._release_forks(sequence)
        self.scheduler.remove(sequence)
        output = None
        if request.finished:
            request.metrics.total_s = time.perf_counter() - request.arrival
            self.requests.pop(request.request_id, None)
            output = request.output()
        request.deltas.append(Delta(sequence.index, text, [] if token is None else [token], reason, output))

    def _release_forks(self, sequence: Sequence) -> None:
        """The first continuation ended before its prompt was frozen: the others do without."""
        others = sequence.request.sequences[1:]
        if sequence.index == 0 and not sequence.generated and self.scheduler.cache.enabled:
            self.scheduler.waiting.extend(other for other in others if not other.finished)

    def _rest(self, sequence: Sequence) -> str:
        """Text that was held back as long as it could have become something else."""
        if sequence.decoder is None:
            return ""
        rest = sequence.decoder.finish()
        if sequence.stops is None:
            return rest
        emitted, matched = sequence.stops.push(rest)
        return emitted if matched is not None else emitted + sequence.stops.finish()

    # Failures

    def _failed(self, work: list[Work], error: Exception) -> None:
        """A forward pass raised. With one sequence in it, that one is to blame; with several, each runs alone next."""
        if len(work) == 1:
            self._error(work[0].sequence, error)
            return
        logger.warning("a step of %d sequences failed and is repeated one by one: %s", len(work), error)
        self.scheduler.isolate([item.sequence for item in work])

    def _error(self, sequence: Sequence, error: Exception) -> None:
        logger.error("%s failed", sequence.owner, exc_info=error)
        if not sequence.finished:
            self._finish(sequence, "error", error=f"the request failed inside the engine ({type(error).__name__})")


def _blocks(tokens: list[int]) -> list[list[int]]:
    """The tokens in the blocks in which rows are turned into logits; the last may be empty."""
    return [tokens[at : at + LOGITS_BLOCK] for at in range(0, len(tokens) + 1, LOGITS_BLOCK)]
