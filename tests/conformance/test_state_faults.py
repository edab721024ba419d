"""Faults in what a layer declares and touches, in how it is cut for ranks, and in what it raises."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from statewise.config import ALONE
from statewise.layers.attention.gqa import GroupedQueryAttention
from statewise.layers.linear_attention.kda import KimiDeltaAttention
from statewise.layers.mixer import State
from statewise.memory.blocks import Field, Shard, StateSpec
from statewise.ops.batch import Batch
from tests.conformance.red import RANKS, red

# The declared state


def test_a_spec_larger_than_what_is_written() -> None:
    class Spare(KimiDeltaAttention):
        def state_spec(self) -> StateSpec:
            return StateSpec(**super().state_spec(), spare=Field((4,), torch.float32))

    found = red(Spare, only=["record size"])
    assert "record size" in found
    assert "4 of 4 entries of state 'spare' are never written" in found["record size"].message


def test_segments_of_a_wrong_width() -> None:
    class Wrong(KimiDeltaAttention):
        """v before q and k in the shard, and it is narrower than they."""

        def state_spec(self) -> StateSpec:
            spec = super().state_spec()
            segments = tuple((name, width) for name, width in reversed(self.segments))
            return StateSpec(**{**spec, "conv": replace(spec["conv"], shard=Shard(0, segments))})

    found = red(Wrong, only=RANKS)
    assert found.keys() == {"2 ranks", "4 ranks"}
    assert "state 'conv' put together from 2 ranks" in found["2 ranks"].message


def test_a_spec_that_is_cut_already() -> None:
    class Cut(KimiDeltaAttention):
        def state_spec(self) -> StateSpec:
            return super().state_spec().per_rank(self.tp_rank, self.tp_size)

    assert "shapes of all ranks together" in red(Cut, only=RANKS)["rank cuts"].message


@pytest.mark.parametrize(("num_spec", "channels_last"), [(3, False), (0, True)])
def test_a_window_that_knows_one_layout_only(num_spec: int, channels_last: bool) -> None:
    class Fixed(KimiDeltaAttention):
        def forward(self, hidden: Tensor, batch: Batch, state: State) -> Tensor:
            config = self.engine_config
            if num_spec and config.num_spec:
                state = {**state, "conv": state["conv"][..., : self.conv_taps - 1]}  # the oldest columns
            if channels_last and config.conv_channels_last:
                state = {**state, "conv": state["conv"].clone()}  # written to a copy
            return super().forward(hidden, batch, state)

    only = ["any split", "draft columns", "window order"]
    assert red(Fixed, only=only).keys() == {"window order" if channels_last else "draft columns"}


# The batch


def test_a_write_into_the_next_block() -> None:
    class Straying(KimiDeltaAttention):
        def forward(self, hidden: Tensor, batch: Batch, state: State) -> Tensor:
            output = super().forward(hidden, batch, state)
            others = (batch.records + 1) % len(state["recurrent"])
            others = others[~torch.isin(others, batch.records)]
            state["recurrent"][others, 0, 0, 0] += 1
            return output

    found = red(Straying, only=["specification", "other blocks"])
    assert "other blocks" in found
    assert "its field 'recurrent'" in found["other blocks"].message


def test_an_answer_that_depends_on_the_neighbours() -> None:
    class Averaging(KimiDeltaAttention):
        def forward(self, hidden: Tensor, batch: Batch, state: State) -> Tensor:
            return super().forward(hidden / hidden.abs().max(), batch, state)

    assert "batch order" in red(Averaging, only=["batch order"])


# Ranks


def test_ranks_that_do_not_sum() -> None:
    class Unsummed(KimiDeltaAttention):
        def finalize(self) -> None:
            super().finalize()
            self.o_proj.ranks = ALONE

    found = red(Unsummed, only=RANKS)
    assert found.keys() == {"2 ranks", "4 ranks"}
    assert "sums over the ranks once" in found["2 ranks"].message


def test_a_rank_that_sums_more_often_than_the_others_does_not_hang() -> None:
    class Uneven(KimiDeltaAttention):
        def forward(self, hidden: Tensor, batch: Batch, state: State) -> Tensor:
            output = super().forward(hidden, batch, state)
            return self.ranks.all_reduce(output) if self.tp_rank == 1 else output

    class Last(KimiDeltaAttention):
        def forward(self, hidden: Tensor, batch: Batch, state: State) -> Tensor:
            output = super().forward(hidden, batch, state)
            last = len(output) == 1 and int(batch.lengths[0]) == 4
            return self.ranks.all_reduce(output) if self.tp_rank == 1 and last else output

    found = red(Uneven, only=RANKS)
    assert found.keys() == {"2 ranks", "4 ranks"}
    assert "the ranks sum tensors that differ" in found["2 ranks"].message
    waiting = red(Last, only=["2 ranks"])["2 ranks"].message
    assert re.match(r"rank 1 (calls|waits in) all_reduce, but rank 0 has returned", waiting)


def test_a_rank_that_fails_frees_the_others() -> None:
    class Failing(KimiDeltaAttention):
        def forward(self, hidden: Tensor, batch: Batch, state: State) -> Tensor:
            if self.tp_rank == 1:
                raise ValueError("the second rank is broken")
            return super().forward(hidden, batch, state)

    found = red(Failing, only=RANKS)
    assert found.keys() == {"2 ranks", "4 ranks"}
    assert "ValueError: the second rank is broken (conformance/test_state_faults.py, line" in found["4 ranks"].message


def test_a_rank_that_takes_the_wrong_shared_head() -> None:
    class Striped(GroupedQueryAttention):
        """2 key-value heads over 4 ranks: rank r takes head r mod 2 in place of head r / 2."""

        def forward(self, hidden: Tensor, batch: Batch, state: State) -> Tensor:
            return super().forward(hidden, batch, state)

        def rank_ranges(self, length: int, shard: Shard) -> tuple[tuple[int, int], ...]:
            units = length // shard.unit
            if not shard.shared or self.ranks.size <= units:
                return super().rank_ranges(length, shard)
            first = self.ranks.rank % units * shard.unit
            return ((first, first + shard.unit),)

    found = red(Striped, only=RANKS)
    assert found.keys() == {"4 ranks"}


# What the layer raises, and what the reference does


def test_an_error_of_the_layer_is_a_finding() -> None:
    class Broken(KimiDeltaAttention):
        def forward(self, hidden: Tensor, batch: Batch, state: State) -> Tensor:
            raise KeyError("recurent")

    found = red(Broken, only=["any split"])
    assert found["any split"].message.startswith("KeyError: 'recurent' (conformance/test_state_faults.py, line")


def test_an_error_of_the_reference_is_told_from_one_of_the_layer() -> None:
    class Misdescribed(KimiDeltaAttention):
        def reference(self, hidden: Tensor, weights: Any, state: Any, start: int) -> Tensor:
            return super().reference(hidden, {}, state, start)

    found = red(Misdescribed, only=["specification"])
    assert found["specification"].message.startswith("reference() raises KeyError: 'q_conv1d.weight'")
