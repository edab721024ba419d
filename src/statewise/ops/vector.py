"""What the numba kernels of several operators share: flat memory, either dtype, an exponential that vectorises.

Kernels see every tensor as one flat array plus the distance between its rows. So a slice of a wider projection and
a field of a pool block need no copy, each kernel is compiled for contiguous memory only, and once per dtype.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload
from torch import Tensor

from statewise.ops.arrays import as_array, load_bf16, store_bf16

DTYPES = (torch.float32, torch.bfloat16)
"""What the kernels read and write. They calculate in float32."""

LOG2_E = np.float32(1.4426950408889634)
LN2_HIGH = np.float32(0.693359375)  # few bits, so that a whole multiple of it is exact
LN2_LOW = np.float32(-2.12194440e-4)


def flat(tensor: Tensor) -> np.ndarray:
    """The memory between the first and the last element of a tensor of any (non-negative) strides, as one array."""
    if tensor.is_contiguous():
        return as_array(tensor).reshape(-1)
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return as_array(tensor.as_strided((span if tensor.numel() else 0,), (1,)))


def flat_rows(tensor: Tensor) -> tuple[np.ndarray, int]:
    """(flat memory, elements between consecutive entries of dim 0), with everything behind dim 0 contiguous.

    A tensor that is not contiguous behind dim 0 is copied first, so this is for what a kernel only reads.
    """
    if not tensor.is_contiguous() and not tensor[:1].is_contiguous():
        tensor = tensor.contiguous()
    return flat(tensor), tensor.stride(0)


def load(value: Any) -> Any:
    """float32 value of an element as it lies in memory (kernels only)."""
    raise NotImplementedError


@overload(load, strict=False)
def _load(value: Any) -> Any:
    if value == types.uint16:
        return lambda value: load_bf16(value)
    return lambda value: value


def store(memory: Any, index: Any, value: Any) -> Any:
    """memory[index] = value, rounded to the dtype of the memory (kernels only)."""
    raise NotImplementedError


@overload(store, strict=False)
def _store(memory: Any, index: Any, value: Any) -> Any:
    if memory.dtype == types.uint16:

        def rounded(memory: Any, index: Any, value: Any) -> None:
            memory[index] = store_bf16(np.float32(value))

        return rounded

    def plain(memory: Any, index: Any, value: Any) -> None:
        memory[index] = value

    return plain


@intrinsic
def prefetch(typingctx: Any, array: Any, offset: Any) -> Any:
    """Ask for the cache line that holds the element `offset` of a contiguous array, which may lie behind its end."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        address = builder.bitcast(builder.gep(data, [args[1]]), cgutils.voidptr_t)
        word = ir.IntType(32)
        fetch = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, word, word, word]), "llvm.prefetch.p0"
        )
        builder.call(fetch, [address, ir.Constant(word, 0), ir.Constant(word, 3), ir.Constant(word, 1)])
        return context.get_dummy_value()

    return types.void(array, types.int64), codegen


@intrinsic
def _power_of_two(typingctx: Any, exponent: Any) -> Any:
    """2 ** exponent as float32, for a whole exponent from -126 to 127."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(32)
        biased = builder.add(args[0], ir.Constant(word, 127))
        return builder.bitcast(builder.shl(biased, ir.Constant(word, 23)), ir.FloatType())

    return types.float32(types.int32), codegen


@intrinsic
def _fraction_bits(typingctx: Any, value: Any) -> Any:
    """The bits of a float32 as int32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), codegen


@intrinsic
def _from_bits(typingctx: Any, bits: Any) -> Any:
    """The float32 with the given bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


@numba.njit(nogil=True, cache=True, fastmath={"contract"})
def exponential(x: Any) -> Any:
    """e ** x in float32 within 2 units of the last place; from 0 to e ** 88; NaN stays NaN.

    A call of the C library's `expf` keeps a loop from being vectorised; this is branch-free. The polynomial is the
    one of the Cephes library (S. Moshier).
    """
    y = x if x > np.float32(-87.33) else np.float32(-87.33)
    y = y if y < np.float32(88.0) else np.float32(88.0)
    n = np.floor(y * LOG2_E + np.float32(0.5))
    r = y - n * LN2_HIGH - n * LN2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    value = (p * (r * r) + r + np.float32(1.0)) * _power_of_two(np.int32(n))
    value = np.float32(0.0) if x < np.float32(-87.33) else value
    return value if x == x else x


@numba.njit(nogil=True, cache=True, fastmath={"contract"}, error_model="numpy")
def sigmoid(x: Any) -> Any:
    """1 / (1 + e ** -x) in float32."""
    return np.float32(1.0) / (np.float32(1.0) + exponential(-x))


@numba.njit(nogil=True, cache=True, fastmath={"contract"})
def logarithm(x: Any) -> Any:
    """Natural logarithm in float32 of a positive normal number, within 2 units of the last place; branch-free.

    The polynomial is the one of the Cephes library (S. Moshier).
    """
    bits = _fraction_bits(x)
    exponent = np.int32((bits >> np.int32(23)) - np.int32(126))
    m = _from_bits(np.int32((bits & np.int32(0x007FFFFF)) | np.int32(0x3F000000)))  # from 0.5 to 1
    low = m < np.float32(0.70710678)
    e = np.float32(exponent) - (np.float32(1.0) if low else np.float32(0.0))
    r = m + (m if low else np.float32(0.0)) - np.float32(1.0)
    p = np.float32(7.0376836292e-2)
    p = p * r - np.float32(1.1514610310e-1)
    p = p * r + np.float32(1.1676998740e-1)
    p = p * r - np.float32(1.2420140846e-1)
    p = p * r + np.float32(1.4249322787e-1)
    p = p * r - np.float32(1.6668057665e-1)
    p = p * r + np.float32(2.0000714765e-1)
    p = p * r - np.float32(2.4999993993e-1)
    p = p * r + np.float32(3.3333331174e-1)
    z = r * r
    return r + (p * r * z + e * LN2_LOW - np.float32(0.5) * z) + e * LN2_HIGH


@numba.njit(nogil=True, cache=True, fastmath={"contract"})
def softplus(x: Any) -> Any:
    """log(1 + e ** x) in float32, to 1e-7 absolutely; NaN stays NaN."""
    positive = x if x > np.float32(0.0) else np.float32(0.0)
    value = positive + logarithm(np.float32(1.0) + exponential(-abs(x)))
    return value if x == x else x
