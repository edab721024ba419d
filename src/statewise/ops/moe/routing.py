"""The router's choice of experts."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from statewise.ops.vector import exponential, sigmoid


@njit(cache=True, nogil=True)
def _softmax(logits, scores):  # type: ignore[no-untyped-def]
    top = logits[0]
    for e in range(len(logits)):
        top = logits[e] if logits[e] > top else top
    total = np.float32(0)
    for e in range(len(logits)):
        scores[e] = exponential(logits[e] - top)
        total += scores[e]
    for e in range(len(logits)):
        scores[e] /= total


@njit(cache=True, nogil=True)
def _take_largest(values, taken):  # type: ignore[no-untyped-def]
    """Index of the largest value not yet taken, of equals the first; it is marked. A NaN is taken last."""
    best = -1
    for i in range(len(values)):
        if not taken[i] and (best < 0 or values[i] > values[best] or values[best] != values[best]):
            best = i
    taken[best] = True
    return best


@njit(cache=True, nogil=True)
def _mask_groups(choice, taken, num_groups, top_groups):  # type: ignore[no-untyped-def]
    """Mark as taken the experts outside the `top_groups` groups whose two largest values have the largest sum."""
    size = len(choice) // num_groups
    strength = np.empty(num_groups, np.float32)
    for g in range(num_groups):
        first, second = np.float32(-np.inf), np.float32(-np.inf)
        for e in range(g * size, (g + 1) * size):
            if choice[e] > first:
                first, second = choice[e], first
            elif choice[e] > second:
                second = choice[e]
        strength[g] = first + second if size > 1 else first
    kept = np.zeros(num_groups, np.bool_)
    for _ in range(top_groups):
        _take_largest(strength, kept)
    for e in range(len(choice)):
        taken[e] = not kept[e // size]


@njit(cache=True, nogil=True)
def choose_row(logits, bias, rule, scale, ids, weights):  # type: ignore[no-untyped-def]
    """logits [E] and bias [E] float32 -> ids [k] int64, weights [k] float32.

    `rule` is (softmax, renormalize, number of groups, groups that take part).
    """
    softmax, renormalize, num_groups, top_groups = rule
    experts = len(logits)
    scores = np.empty(experts, np.float32)
    choice = np.empty(experts, np.float32)
    taken = np.zeros(experts, np.bool_)
    if softmax:
        _softmax(logits, scores)
    else:
        for e in range(experts):
            scores[e] = sigmoid(logits[e])
    for e in range(experts):
        choice[e] = scores[e] + bias[e]
    if num_groups > 1:
        _mask_groups(choice, taken, num_groups, top_groups)
    total = np.float32(1e-20)
    for k in range(len(ids)):
        ids[k] = _take_largest(choice, taken)
        weights[k] = scores[ids[k]]
        total += weights[k]
    factor = scale / total if renormalize else scale
    for k in range(len(ids)):
        weights[k] *= factor


@njit(cache=True, nogil=True, parallel=True)
def choose(logits, bias, rule, scale, ids, weights):  # type: ignore[no-untyped-def]
    """`choose_row` for logits [T, E] -> ids [T, k], weights [T, k]."""
    for t in prange(len(logits)):
        choose_row(logits[t], bias, rule, scale, ids[t], weights[t])
