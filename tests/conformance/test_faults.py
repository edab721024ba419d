"""Faults that a layer can have, each put into a good one: the kit turns red, and the right check says what is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from statewise.config import ALONE
from statewise.conformance import CHECKS, Finding, prove
from statewise.layers.attention.gqa import GroupedQueryAttention
from statewise.layers.linear_attention.kda import KdaConfig, KimiDeltaAttention
from statewise.layers.linear_attention.minimax import MiniMaxText01LinearAttention
from statewise.layers.mixer import State
from statewise.memory.blocks import Field, Shard, StateSpec
from statewise.ops.batch import Batch
from statewise.ops.delta_rule import chunked_cpu as delta_chunks
from statewise.ops.lightning import chunked_cpu as lightning_chunks

Red = dict[str, Finding]


SLOW = ("maximum length", "extreme input")
QUICK = [check.name for check in CHECKS if check.name not in SLOW]


RANKS = ["specification", "rank cuts", "2 ranks", "4 ranks"]


def red(layer: type, dtype: str = "float32", only: list[str] = QUICK) -> Red:
    """The failed checks of a layer, by name."""
    return {finding.check: finding for finding in prove(layer, [dtype], long=256, only=only).failed}


# The recurrence


@pytest.mark.parametrize(
    ("layer", "module", "name"),
    [
        (KimiDeltaAttention, delta_chunks, "advance"),
        (MiniMaxText01LinearAttention, lightning_chunks, "advance"),
    ],
)
def test_a_decay_between_chunks_that_is_off_by_one_token(
    layer: type, module: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right: Callable[..., None] = getattr(module, name)

    def wrong(work: Any, states: Tensor, *more: Any) -> None:
        right(work._replace(decay=work.decay ** (65 / 64)), states, *more)

    monkeypatch.setattr(module, name, wrong)
    found = red(layer)
    assert {"specification", "any split", "initial state", "long input"} <= found.keys()
    assert "first at token" in found["specification"].message


class Square(KimiDeltaAttention):
    """Keys as wide as values: a transposed state has the right shape."""

    @classmethod
    def example_config(cls) -> Any:
        return SimpleNamespace(hidden_size=48, rms_norm_eps=1e-5, kda=KdaConfig(4, 16, 16, 4))


class Transposed(Square):
    """Stores S^T for S, always: consistent with itself."""

    def forward(self, hidden: Tensor, batch: Batch, state: State) -> Tensor:
        turned = state["recurrent"].mT.contiguous()
        output = super().forward(hidden, batch, {**state, "recurrent": turned})
        state["recurrent"].copy_(turned.mT)
        return output


def test_a_state_stored_transposed() -> None:
    assert not red(Square, only=["specification", "initial state"])
    found = red(Transposed)
    assert {"specification", "initial state"} <= found.keys()
    assert not {"any split", "fresh record", "batch order", "2 ranks"} & found.keys()
    assert found["specification"].message.startswith("state 'recurrent' is off by")
    assert "axes swapped?" in found["specification"].message


def test_a_state_read_transposed_by_the_decode_step() -> None:
    class DecodesTransposed(Transposed):
        def forward(self, hidden: Tensor, batch: Batch, state: State) -> Tensor:
            if batch.num_decodes == batch.num_sequences:
                return super().forward(hidden, batch, state)
            return Square.forward(self, hidden, batch, state)

    assert {"any split", "initial state", "one-token prompt"} <= red(DecodesTransposed).keys()


# Freshness


class Freshness(KimiDeltaAttention):
    """Decides for itself which sequences are fresh."""

    def fresh(self, batch: Batch) -> Tensor:
        raise NotImplementedError

    def forward(self, hidden: Tensor, batch: Batch, state: State) -> Tensor:
        return super().forward(hidden, replace(batch, fresh=self.fresh(batch), shared={}), state)


def test_a_fresh_record_that_is_not_zeroed() -> None:
    class Dirty(Freshness):
        def fresh(self, batch: Batch) -> Tensor:
            return torch.zeros_like(batch.fresh)

    found = red(Dirty)
    assert {"fresh record", "recycled record", "one-token prompt"} <= found.keys()
    assert "batch.fresh[i]" in found["fresh record"].message


def test_a_one_token_prompt_taken_for_a_decode() -> None:
    class ByRows(Freshness):
        def fresh(self, batch: Batch) -> Tensor:
            return batch.fresh & (batch.query_start.diff() > 1)

    found = red(ByRows)
    assert "one-token prompt" in found
    assert not {"specification", "fresh record", "recycled record"} & found.keys()


def test_a_fresh_record_multiplied_by_zero() -> None:
    class Multiplied(KimiDeltaAttention):
        def forward(self, hidden: Tensor, batch: Batch, state: State) -> Tensor:
            state["recurrent"][batch.records[batch.fresh]] *= 0
            return super().forward(hidden, replace(batch, fresh=torch.zeros_like(batch.fresh), shared={}), {
                **state, "conv": cleared(state["conv"], batch)})  # fmt: skip

    def cleared(conv: Tensor, batch: Batch) -> Tensor:
        conv[batch.records[batch.fresh]] = 0
        return conv

    found = red(Multiplied)
    assert list(found) == ["fresh record"]
    assert "in a block of nan" in found["fresh record"].message


# Precision


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_decay_kept_in_bfloat16(dtype: str) -> None:
    class Coarse(KimiDeltaAttention):
        def finalize(self) -> None:
            self.A_log.copy_(self.A_log.bfloat16())
            super().finalize()

    class CoarseSlopes(MiniMaxText01LinearAttention):
        def finalize(self) -> None:
            super().finalize()
            self.weights = replace(self.weights, slopes=self.weights.slopes.bfloat16().float())

    for layer in (Coarse, CoarseSlopes):
        found = red(layer, dtype, only=["any split", "decay in silence"])
        assert "decay in silence" in found
        assert "tokens of silence is off by" in found["decay in silence"].message
        assert "in float32" in found["decay in silence"].message


def test_a_parameter_declared_in_the_dtype_of_the_layer() -> None:
    class Declared(KimiDeltaAttention):
        def declare(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
            super().declare(name, shape, self.dtype if name == "A_log" else dtype)

        def finalize(self) -> None:
            self.A_log = torch.nn.Parameter(self.A_log.float(), requires_grad=False)
            super().finalize()

    assert not red(Declared, "float32", only=["decay in silence"])
    assert "decay in silence" in red(Declared, "bfloat16", only=["decay in silence"])


def test_a_state_rounded_to_bfloat16_in_a_float32_record() -> None:
    class Rounded(KimiDeltaAttention):
        def forward(self, hidden: Tensor, batch: Batch, state: State) -> Tensor:
            output = super().forward(hidden, batch, state)
            own = batch.records
            state["recurrent"][own] = state["recurrent"][own].bfloat16().float()
            return output

    assert {"specification", "decay in silence"} <= red(Rounded, only=["specification", "decay in silence"]).keys()


def test_an_exponential_that_overflows() -> None:
    class Overflowing(KimiDeltaAttention):
        def forward(self, hidden: Tensor, batch: Batch, state: State) -> Tensor:
            size = hidden.abs().amax(-1, keepdim=True)
            return super().forward(hidden * (size.exp() / size.exp()), batch, state)

    found = red(Overflowing, only=["specification", "any split", "extreme input"])
    assert list(found) == ["extreme input"]
    assert "for inputs times 1e3 has NaN or infinity" in found["extreme input"].message


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

    class Short(KimiDeltaAttention):
        def state_spec(self) -> StateSpec:
            spec = super().state_spec()
            return StateSpec(**{**spec, "conv": replace(spec["conv"], shard=Shard(0, self.segments[:2]))})

    found = red(Wrong, only=RANKS)
    assert found.keys() == {"2 ranks", "4 ranks"}
    assert "state 'conv' put together from 2 ranks" in found["2 ranks"].message
    assert "the segments cover 128 entries of an axis of 160" in red(Short, only=RANKS)["rank cuts"].message


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
    assert "ValueError: the second rank is broken (conformance/test_faults.py, line" in found["4 ranks"].message


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
    assert found["any split"].message.startswith("KeyError: 'recurent' (conformance/test_faults.py, line")


def test_an_error_of_the_reference_is_told_from_one_of_the_layer() -> None:
    class Misdescribed(KimiDeltaAttention):
        def reference(self, hidden: Tensor, weights: Any, state: Any, start: int) -> Tensor:
            return super().reference(hidden, {}, state, start)

    found = red(Misdescribed, only=["specification"])
    assert found["specification"].message.startswith("reference() raises KeyError: 'q_conv1d.weight'")
