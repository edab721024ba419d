"""What a token would take in a cache of keys and values if every layer of the model were softmax attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from statewise.api.model_summary import ModelSummary
from statewise.api.plan import full_attention_page
from statewise.config import EngineConfig
from statewise.layers.attention.mla import MultiHeadLatentAttention
from statewise.layers.linear_attention.base import LinearAttention
from statewise.layers.mixer import TokenMixer


@dataclass(frozen=True)
class SoftmaxCost:
    """Two models of the same shape without linear layers. Bytes per token, in all layers and on all ranks."""

    kv_bytes: int  # every layer keeps the keys and values of its heads
    own_bytes: int  # every linear layer is one of the model's own softmax layers, which may keep less
    own_description: str


def softmax_cost(mixers: Sequence[TokenMixer], summary: ModelSummary, config: EngineConfig) -> SoftmaxCost:
    """Account for a model in its dtype."""
    page, description = full_attention_page(mixers, summary, config)
    return SoftmaxCost(sum(map(_keys_and_values, mixers)), -(-page.nbytes // config.page_size), description)


def _keys_and_values(mixer: TokenMixer) -> int:
    """Bytes of a token's keys and values in one layer, as a plain cache keeps them: head by head, uncompressed."""
    if isinstance(mixer, LinearAttention):
        return 2 * mixer.num_heads * mixer.head_dim * mixer.dtype.itemsize
    if isinstance(mixer, MultiHeadLatentAttention):
        sizes = mixer.sizes
        return sizes.num_heads * (sizes.nope_dim + sizes.rope_dim + sizes.value_dim) * mixer.dtype.itemsize
    if mixer.scope == "page":  # grouped-query attention keeps exactly this; of another layer nothing else is known
        return mixer.state_spec().nbytes
    hidden_size: int = mixer.config.hidden_size  # of a layer that says nothing of heads: they fill a row
    return 2 * hidden_size * mixer.dtype.itemsize
