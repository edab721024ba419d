"""From logits to tokens. Rows are independent: what one request asks for, or breaks, does not touch another."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from statewise.engine.grammar import Matcher
from statewise.engine.request import Sequence, TokenLogprob
from statewise.errors import RequestError

# What each byte of a structure's mask adds to eight logits. A look-up and a sum are ten times as fast as a masked fill.
_BYTES = torch.where(((torch.arange(256)[:, None] >> torch.arange(8)) & 1).bool(), 0.0, -math.inf)  # [256, 8]
LEAST = -9999.0  # log-probability of a token that cannot come; minus infinity is not a number in JSON


@dataclass(frozen=True)
class Sampled:
    """The token chosen for a sequence, or the error that ends it."""

    token: int = -1
    logprob: TokenLogprob | None = None
    error: str | None = None
    error_field: str | None = None  # of the request, where it is to blame


class Sampler:
    """Chooses the next token of each sequence from one row of logits each."""

    def __init__(self, vocab_size: int, terminal_ids: frozenset[int], blank_ids: Iterable[int] = ()) -> None:
        blank = set(blank_ids)
        while vocab_size - 1 in blank and vocab_size > 1:
            vocab_size -= 1
        self.vocab_size = vocab_size  # ids from here on are padding rows of the embedding and are never chosen
        self.blank_ids = torch.tensor(sorted(i for i in blank if i < vocab_size), dtype=torch.int64)  # nor are these
        self.terminal_ids = terminal_ids

    def usable(self, logits: Tensor) -> Tensor:
        """A copy of `logits` [N, vocab] in which the ids that are never chosen have no probability."""
        masked = logits.index_fill(1, self.blank_ids, -math.inf)
        masked[:, self.vocab_size :] = -math.inf
        return masked

    def sample(self, logits: Tensor, sequences: list[Sequence]) -> list[Sampled]:
        """One `Sampled` per row of `logits` [N, vocab] fp32, which is left unchanged."""
        logits = logits[:, : self.vocab_size]
        if len(self.blank_ids):
            logits = logits.index_fill(1, self.blank_ids, -math.inf)
        scores = logits
        errors: dict[int, str] = {}
        fields: dict[int, str] = {}  # of requests, which are to blame for an error
        for row, sequence in enumerate(sequences):
            if sequence.params.edits_logits:
                if scores is logits:
                    scores = logits.clone()
                try:
                    scores[row] = self._edited(scores[row], sequence)
                except RequestError as error:
                    errors[row], fields[row] = str(error), error.field
                except Exception as error:
                    errors[row] = f"the logits could not be edited ({type(error).__name__})"
        best, tokens = scores.max(dim=-1)
        chosen = tokens.tolist()
        for row, value in enumerate(best.tolist()):
            if not math.isfinite(value):
                errors.setdefault(row, "the model produced logits that are not finite")
        random = [row for row, sequence in enumerate(sequences) if not sequence.params.greedy and row not in errors]
        # Two groups, because the order in which tokens are drawn from must not depend on the neighbours.
        for truncates in (False, True):
            rows = [row for row in random if sequences[row].params.truncates is truncates]
            if rows:
                picked = self._draw(scores[rows], [sequences[row] for row in rows], truncates)
                for row, token in zip(rows, picked, strict=True):
                    chosen[row] = token
        wanted = [row for row, s in enumerate(sequences) if s.params.wants_logprobs and row not in errors]
        logprobs = {row: one_logprob(logits[row], chosen[row], sequences[row].params.logprobs or 0) for row in wanted}
        return [
            Sampled(error=errors[row], error_field=fields.get(row))
            if row in errors
            else Sampled(chosen[row], logprobs.get(row))
            for row in range(len(sequences))
        ]

    def _edited(self, row: Tensor, sequence: Sequence) -> Tensor:
        """Penalties, bias, the structure of the answer and its minimum length."""
        params = sequence.params
        if params.repetition_penalty != 1.0:
            known = sorted(token for token in set(sequence.tokens) if token < row.shape[0])
            seen = torch.tensor(known, dtype=torch.int64, device=row.device)
            values = row[seen]
            row[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
        if sequence.counts and (params.presence_penalty or params.frequency_penalty):
            ids = torch.tensor(list(sequence.counts.keys()), dtype=torch.int64, device=row.device)
            counts = torch.tensor(list(sequence.counts.values()), dtype=row.dtype, device=row.device)
            row[ids] -= params.presence_penalty + params.frequency_penalty * counts
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias.keys()), dtype=torch.int64, device=row.device)
            row[ids] += torch.tensor(list(params.logit_bias.values()), dtype=row.dtype, device=row.device)
        if sequence.matcher is not None:
            row = self._structured(row, sequence.matcher)
        if sequence.generated < params.min_tokens:
            terminal = [*params.stop_token_ids] if params.ignore_eos else [*self.terminal_ids, *params.stop_token_ids]
            longer = row.clone()
            longer[[token for token in terminal if token < row.shape[0]]] = float("-inf")
            if sequence.matcher is None or longer.isfinite().any():  # a structure may leave nothing but the end
                row = longer
        return row

    def _structured(self, row: Tensor, matcher: Matcher) -> Tensor:
        """The row without the tokens that the structure does not allow next. Raises `RequestError`."""
        if not matcher.begun:  # what stands before it may hold anything, but must not end
            row[[token for token in self.terminal_ids if token < row.shape[0]]] = float("-inf")
            return row
        mask = torch.frombuffer(bytearray(matcher.allowed()), dtype=torch.uint8)
        added = _BYTES.to(row.device).index_select(0, mask.to(row.device).int()).flatten()[: row.shape[0]]
        row[: len(added)] += added
        row[len(added) :] = float("-inf")
        if row.max() == float("-inf"):
            reason = "the structure of the answer allows no token that the model has; change it"
            raise RequestError(matcher.field, reason)
        return row

    def _draw(self, scores: Tensor, sequences: list[Sequence], truncates: bool) -> list[int]:
        """Sample by inverting the cumulative distribution at one uniform number of each sequence's own generator."""

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=scores.device)[:, None]

        params = [sequence.params for sequence in sequences]
        probabilities = (scores / column([p.temperature for p in params])).softmax(dim=-1)
        order: Tensor | None = None
        if truncates:
            probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
            probabilities = truncate(probabilities, params)
        cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
        uniform = torch.tensor([[s.random.random()] for s in sequences], dtype=torch.float64, device=scores.device)
        # Strictly below the total, so that a token of probability 0 behind the end is never taken.
        index = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
        last = (probabilities > 0).cumsum(dim=-1).argmax(dim=-1, keepdim=True)
        index = torch.minimum(index, last)
        return (index if order is None else order.gather(1, index)).flatten().tolist()


def truncate(probabilities: Tensor, params: list) -> Tensor:  # type: ignore[type-arg]
    """Zero what top_k, top_p and min_p exclude, row by row; `probabilities` [N, vocab] falls along each row."""
    size = probabilities.shape[-1]
    rank = torch.arange(size, device=probabilities.device)

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=probabilities.device)[:, None]

    kept = rank < column([float(p.top_k or size) for p in params])
    probabilities = probabilities * kept
    probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    before = probabilities.cumsum(dim=-1) - probabilities  # mass of the tokens that are more likely
    top_p = column([p.top_p for p in params])
    kept = (before < top_p) | (top_p >= 1)
    kept &= probabilities >= probabilities[:, :1] * column([p.min_p for p in params])
    return probabilities * kept


def one_logprob(logits: Tensor, token: int, alternatives: int) -> TokenLogprob:
    """Log-probability of `token` under a row of logits [vocab], its rank, and the most likely alternatives."""
    logprobs = logits.log_softmax(dim=-1)
    chosen = logprobs[token]
    top: dict[int, float] = {}
    if alternatives:
        values, ids = logprobs.topk(min(alternatives, logprobs.shape[-1]))
        top = dict(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, max(float(chosen), LEAST), int((logprobs > chosen).sum()) + 1, top)
