"""What transformers answers on a checkpoint, and what it writes when it saves one."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def reference_logits(directory: Path | str, token_ids: Sequence[int]) -> Tensor:
    """[T, vocabulary] fp32: what transformers answers on a `hub` or `saved` checkpoint, one pass, no cache.

    It has Kimi-Linear, MiniMax in the `hf` layout (and rotates whole heads there, whatever `rotary_dim` says) and
    MiniMax-M2. The model and the answer are kept for the rest of the test session; do not write to the result.
    """
    return _logits(str(directory), tuple(token_ids))


def saved_by_transformers(source: Path | str, directory: Path | str) -> Path:
    """Load a checkpoint with transformers and save it again, in `directory`, which it returns."""
    _load(str(source)).save_pretrained(directory)
    return Path(directory)


@functools.cache
def _logits(directory: str, token_ids: tuple[int, ...]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = _load(directory)(torch.tensor([token_ids]), use_cache=False).logits
    return logits[0].float().clone()


@functools.cache
def _load(directory: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(  # in evaluation mode
        directory, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
