"""Faults that a layer can have, each put into a good one: the kit turns red, and the right check says what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from statewise.layers.linear_attention.kda import KdaConfig, KimiDeltaAttention
from statewise.layers.linear_attention.minimax import MiniMaxText01LinearAttention
from statewise.layers.mixer import State
from statewise.ops.batch import Batch
from statewise.ops.delta_rule import chunked_cpu as delta_chunks
from statewise.ops.lightning import chunked_cpu as lightning_chunks
from tests.conformance.red import red

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
