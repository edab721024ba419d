"""Softmax attention whose keys and values lie in pages: multi-head latent (MLA) and grouped-query (GQA) attention."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from statewise.ops.batch import Batch
from statewise.ops.vector import DTYPES

__all__ = ["gqa_attention", "mla_attention", "write_pages"]


def write_pages(entries: Tensor, cache: Tensor, batch: Batch) -> None:
    """Write row t of `entries` [T, W] to slot `batch.slots[t]` of `cache` [pages, page_size, W], in place.

    Or entries [T, Hkv, D] to cache [pages, page_size, Hkv, D]: the last dims, one or two, are the same. `cache` may be
    a field of larger blocks: its dim 0 may have any stride, its inner dims are contiguous.
    Raises `ValueError` if a shape or dtype does not fit or a slot lies outside the cache; then nothing is written.
    """
    _check_cache("cache", cache, 4 if cache.dim() == 4 else 3, batch)
    _check("entries", entries, (batch.num_rows, *cache.shape[2:]), cache)
    _backend(cache).write_pages(entries.flatten(1), cache.flatten(2), batch)


def mla_attention(
    q_nope: Tensor, q_rope: Tensor, key_up: Tensor, value_up: Tensor, cache: Tensor, batch: Batch, scale: float
) -> Tensor:
    """Causal multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, §2.1) of a mixed batch. Returns [T, H, Dv].

    q_nope [T, H, Dn] and q_rope [T, H, Dr] are the two parts of each query, the second one already rotated where the
    model rotates. key_up [H, Dn, R] and value_up [H, Dv, R] expand a latent to keys and values. cache
    [pages, page_size, R + Dr] holds (latent | shared rope key) of every token, the rows of this step included; the
    entry of position p of sequence i lies at page `batch.pages[i, p // page_size]`, offset `p % page_size`.

    All tensors are float32 or all are bfloat16; the softmax is float32. `cache` and the two expansions may have any
    stride in dim 0, the queries in all dims but the last. A decode row's result does not depend on the rest of the
    batch, to the bit.
    Raises `ValueError` if a shape or dtype does not fit or a page lies outside the cache.
    """
    _check_cache("cache", cache, 3, batch)
    rows, heads = batch.num_rows, key_up.shape[0]
    nope, rank = key_up.shape[1:]
    _check("q_nope", q_nope, (rows, heads, nope), cache)
    _check("q_rope", q_rope, (rows, heads, cache.shape[2] - rank), cache)
    _check("key_up", key_up, (heads, nope, rank), cache)
    _check("value_up", value_up, (heads, value_up.shape[1], rank), cache)
    if not key_up[0].is_contiguous() or not value_up[0].is_contiguous():
        raise ValueError("key_up and value_up must be contiguous within a head")
    output: Tensor = _backend(cache).mla_attention(q_nope, q_rope, key_up, value_up, cache, batch, scale)
    return output


def gqa_attention(q: Tensor, keys: Tensor, values: Tensor, batch: Batch, scale: float) -> Tensor:
    """Causal grouped-query attention (Ainslie et al., arXiv 2305.13245) of a mixed batch. Returns [T, H, Dv].

    q [T, H, D], already rotated where the model rotates. keys [pages, page_size, Hkv, D] and values
    [pages, page_size, Hkv, Dv] hold what every token has, the rows of this step included; position p of sequence i
    lies at page `batch.pages[i, p // page_size]`, offset `p % page_size`. Query head h sees key head h // (H / Hkv).

    All tensors are float32 or all are bfloat16; the softmax is float32. `keys` and `values` may have any stride in
    dim 0, the queries in all dims but the last. A decode row's result does not depend on the rest of the batch or on
    the number of threads, to the bit.
    Raises `ValueError` if a shape or dtype does not fit or a page lies outside the cache.
    """
    _check_cache("keys", keys, 4, batch)
    _check_cache("values", values, 4, batch)
    shared, width = keys.shape[2:]
    _check("values", values, (len(keys), batch.page_size, shared, values.shape[3]), keys)
    heads = q.shape[1] if q.dim() == 3 else 0
    if not shared or not heads or heads % shared:
        raise ValueError(f"q must be [T, H, D] with a multiple of the {shared} key heads, not {list(q.shape)}")
    _check("q", q, (batch.num_rows, heads, width), keys)
    output: Tensor = _backend(keys).gqa_attention(q, keys, values, batch, scale)
    return output


def _check_cache(name: str, cache: Tensor, dims: int, batch: Batch) -> None:
    if cache.dtype not in DTYPES:
        raise ValueError(f"{name} must be float32 or bfloat16, not {cache.dtype}")
    if cache.dim() != dims or cache.shape[1] != batch.page_size:
        inner = "width" if dims == 3 else "heads, width"
        raise ValueError(f"{name} must be [pages, {batch.page_size}, {inner}], not {list(cache.shape)}")
    if not cache[:1].is_contiguous():
        raise ValueError(f"{name} must be contiguous within a page")


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], cache: Tensor) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}, not {list(tensor.shape)}")
    if tensor.stride()[-1] != 1:
        raise ValueError(f"{name} must be contiguous in its last dim")
    if tensor.dtype != cache.dtype or tensor.device != cache.device:
        raise ValueError(
            f"{name} must be {cache.dtype} on {cache.device} like the cache, not {tensor.dtype} on {tensor.device}"
        )


def _backend(cache: Tensor) -> ModuleType:
    """The module that holds the operators for the device of `cache`."""
    if cache.device.type == "cpu":
        from statewise.ops.paged_attention import cpu

        return cpu
    raise ValueError(f"paged attention has no kernels for device {cache.device.type!r}")
