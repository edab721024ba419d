"""NumPy views of tensors for the numba kernels, and the two conversions that numba lacks for bfloat16.

A bfloat16 tensor is seen as uint16, the upper half of a float32. Kernels read it with `load_bf16` and write it
with `store_bf16`; both inline to one or a few vector instructions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic
from torch import Tensor


def as_array(tensor: Tensor) -> np.ndarray:
    """The tensor's own memory as an array of the same shape and strides; bfloat16 appears as uint16."""
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    return tensor.numpy()


LIKE = {torch.float32: np.empty(0, np.float32), torch.bfloat16: np.empty(0, np.uint16)}
"""An array of the dtype that a kernel sees, for each dtype of the tensors."""


@intrinsic
def _pointer(typingctx: Any, address: Any, like: Any) -> Any:
    """The address as a pointer to elements of the dtype of the array `like`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(types.int64, like), codegen


@njit(cache=True, nogil=True)
def memory(address, like):  # type: ignore[no-untyped-def]
    """What lies from an address on, as a flat array (kernels only).

    A view of each tensor, made in Python, would cost more than a short kernel.
    """
    return carray(_pointer(address, like), (0x7FFFFFFFFFFF,))


@intrinsic
def load_bf16(typingctx: Any, bits: Any) -> Any:
    """float32 value of a bfloat16 given as uint16."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = builder.zext(args[0], ir.IntType(32))
        return builder.bitcast(builder.shl(wide, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    return types.float32(types.uint16), codegen


@intrinsic
def store_bf16(typingctx: Any, value: Any) -> Any:
    """bfloat16 bits of a float32, rounded to nearest even (as torch rounds; a NaN stays a NaN)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(32)
        bits = builder.bitcast(args[0], word)
        upper = builder.lshr(bits, ir.Constant(word, 16))
        odd = builder.and_(upper, ir.Constant(word, 1))
        rounded = builder.lshr(builder.add(bits, builder.add(odd, ir.Constant(word, 0x7FFF))), ir.Constant(word, 16))
        quiet = builder.or_(upper, ir.Constant(word, 0x40))
        is_nan = builder.fcmp_unordered("uno", args[0], args[0])
        return builder.trunc(builder.select(is_nan, quiet, rounded), ir.IntType(16))

    return types.uint16(types.float32), codegen
