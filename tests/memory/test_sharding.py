"""Gathering the blocks of all ranks into whole tensors, and cutting those for other ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from statewise.errors import BlockError
from statewise.memory.checkpoint import Checkpoint
from statewise.memory.sharding import cut, gather, same_bits
from tests.memory.states import MODEL, Layers, delta, held_by, latent, layers, random_tensors

SIZES = st.sampled_from([1, 2, 4])
PAGE_SIZES = st.sampled_from([1, 3, 16, 64])


def assert_same(found: Checkpoint, expected: Checkpoint) -> None:
    assert found.num_tokens == expected.num_tokens
    assert torch.equal(found.record, expected.record)
    assert torch.equal(found.pages, expected.pages)


@given(model=layers(), num_tokens=st.integers(0, 37), size=SIZES, other=SIZES, page=PAGE_SIZES, other_page=PAGE_SIZES)
def test_what_some_ranks_hold_is_what_any_other_number_would_hold(
    model: Layers, num_tokens: int, size: int, other: int, page: int, other_page: int
) -> None:
    tensors = random_tensors(model, num_tokens)
    whole = gather(held_by(model, tensors, num_tokens, size, page), *model.specs(page))
    assert whole.keys() == tensors.keys()
    for name, tensor in whole.items():
        assert tensor.shape == tensors[name].shape
        assert same_bits(tensor, tensors[name]), name
    for rank, expected in enumerate(held_by(model, tensors, num_tokens, other, other_page)):
        assert_same(cut(whole, num_tokens, *model.specs(other_page), rank, other), expected)


@pytest.mark.parametrize("path", [(1, 2, 4, 1), (4, 1, 2, 4)])
def test_there_and_back_changes_no_bit(path: tuple[int, ...]) -> None:
    specs = MODEL.specs()
    first = parts = held_by(MODEL, random_tensors(MODEL, 37), 37, path[0])
    for size in path[1:]:
        whole = gather(parts, *specs)
        parts = [cut(whole, 37, *specs, rank, size) for rank in range(size)]
    for found, expected in zip(parts, first, strict=True):
        assert_same(found, expected)


def test_the_memory_order_of_a_window_may_change_in_between() -> None:
    one, other = (Layers({0: delta(last=last)}, {}) for last in (False, True))
    tensors = random_tensors(one, 0)
    whole = gather(held_by(one, tensors, 0, 2), *one.specs())
    assert_same(cut(whole, 0, *other.specs(), 0, 1), held_by(other, tensors, 0, 1)[0])


def test_ranks_that_hold_the_same_must_agree() -> None:
    for model, layer in ((Layers({}, {3: latent()}), 3), (Layers({}, {2: MODEL.pages[2]}), 2)):
        parts = held_by(model, random_tensors(model, 5), 5, 4)
        altered = parts[3].pages.clone()
        altered[0, 0] ^= 1
        parts[3] = replace(parts[3], pages=altered)
        with pytest.raises(BlockError, match=f"rank 3 does not agree .* share of pages.{layer}."):
            gather(parts, *model.specs())


def test_parts_that_do_not_fit_are_refused() -> None:
    specs = MODEL.specs()
    parts = held_by(MODEL, random_tensors(MODEL, 20), 20, 2)
    with pytest.raises(BlockError, match=r"cover \[19, 20\] tokens"):
        gather([parts[0], replace(parts[1], num_tokens=19)], *specs)
    with pytest.raises(BlockError, match="is not 1 blocks of"):
        gather(parts[:1], *specs)
    with pytest.raises(BlockError, match="is not 2 blocks of"):
        gather([replace(part, pages=part.pages[:1]) for part in parts], *specs)
    whole = gather(parts, *specs)
    with pytest.raises(BlockError, match="cannot be split evenly over 3 ranks"):
        cut(whole, 20, *specs, 0, 3)
    with pytest.raises(BlockError, match=r"pages.2.key is \[20, 2, 3\] torch.float32, expected \[21, 2, 3\]"):
        cut(whole, 21, *specs, 0, 1)
    del whole["record.0.conv"]
    with pytest.raises(BlockError, match=r"record.0.conv is missing"):
        cut(whole, 20, *specs, 0, 1)
