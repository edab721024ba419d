"""Faults in the states that a piece leaves on its way, each put into a good layer: the kit sees them."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from statewise.conformance import Finding, Subject, run_check
from statewise.layers.linear_attention.kda import KimiDeltaAttention
from statewise.layers.linear_attention.minimax import MiniMaxText01LinearAttention
from statewise.layers.mixer import State, TokenMixer
from statewise.layers.pluggable import PluggableLayer
from statewise.ops.batch import CHUNK, Batch
from tests.conformance.retention import Retention


def finding(layer: type[TokenMixer], exact: bool = False) -> Finding:
    return run_check("interior states", Subject(layer, torch.float32, exact=exact))


@pytest.mark.parametrize("name", PluggableLayer.names())
def test_registered_layers_keep_the_same_bits(name: str) -> None:
    layer = PluggableLayer.get(name)
    found = finding(layer, exact=True)
    assert found.status == ("held" if layer.scope == "record" else "not applicable"), found.message
    assert layer.capabilities.interior_states


def test_a_layer_that_does_not_list_it_is_not_asked() -> None:
    found = finding(Retention)
    assert found.status == "not applicable"
    assert "a piece ends where a state is wanted" in found.message


def late(batch: Batch) -> Batch:
    """Every state is kept one chunk too late."""
    freezes, chunks = batch.freezes, batch.chunks
    if freezes is None or chunks is None:
        return batch
    first = [0, *accumulate(chunks.active)]
    moved = [chunk + chunks.active[bisect_right(first, chunk) - 1] for chunk in freezes.chunks]
    ends = torch.minimum(freezes.ends + CHUNK, batch.query_start[freezes.sequences + 1])
    return replace(batch, freezes=replace(freezes, chunks=moved, ends=ends), shared={})


class LateDelta(KimiDeltaAttention):
    def forward(self, hidden: Tensor, batch: Batch, state: State) -> Tensor:
        return super().forward(hidden, late(batch), state)


class LateLightning(MiniMaxText01LinearAttention):
    def forward(self, hidden: Tensor, batch: Batch, state: State) -> Tensor:
        return super().forward(hidden, late(batch), state)


@pytest.mark.parametrize("layer", [LateDelta, LateLightning])
def test_a_state_kept_one_chunk_late(layer: type[TokenMixer]) -> None:
    found = finding(layer)
    assert found.status == "failed"
    assert "kept behind" in found.message
    assert "Between two chunks" in found.message


def test_a_window_that_is_not_written() -> None:
    class Forgetful(KimiDeltaAttention):
        def forward(self, hidden: Tensor, batch: Batch, state: State) -> Tensor:
            if batch.freezes is None:
                return super().forward(hidden, batch, state)
            before = state["conv"][batch.freezes.records]
            output = super().forward(hidden, batch, state)
            state["conv"][batch.freezes.records] = before
            return output

    found = finding(Forgetful)
    assert found.status == "failed"
    assert found.message.startswith("state 'conv' kept behind")
    assert "state 'recurrent'" not in found.message


def test_a_layer_that_promises_and_ignores_them() -> None:
    class Promising(Retention):
        capabilities = replace(Retention.capabilities, interior_states=True)

    assert "state 'recurrent' kept behind" in finding(Promising).message


def test_a_state_that_is_also_written_elsewhere() -> None:
    class Straying(MiniMaxText01LinearAttention):
        def forward(self, hidden: Tensor, batch: Batch, state: State) -> Tensor:
            output = super().forward(hidden, batch, state)
            if batch.freezes is not None:
                state["recurrent"][batch.records[0]] += 1
            return output

    assert "differ from a step that keeps none" in finding(Straying).message
