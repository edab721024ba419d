"""Small random checkpoints in the published layouts, and what transformers answers on them."""

from tests.checkpoints.answers import reference_logits, saved_by_transformers
from tests.checkpoints.bailing import bailing_config, bailing_is_full, bailing_tensors
from tests.checkpoints.common import Spelling
from tests.checkpoints.kimi_linear import kimi_linear_config, kimi_linear_tensors
from tests.checkpoints.minimax import minimax_config, minimax_layer_kinds, minimax_tensors
from tests.checkpoints.minimax_m2 import minimax_m2_config, minimax_m2_tensors
from tests.checkpoints.writing import FP32_ALWAYS, respell, write_checkpoint

__all__ = [
    "FP32_ALWAYS",
    "Spelling",
    "bailing_config",
    "bailing_is_full",
    "bailing_tensors",
    "kimi_linear_config",
    "kimi_linear_tensors",
    "minimax_config",
    "minimax_layer_kinds",
    "minimax_m2_config",
    "minimax_m2_tensors",
    "minimax_tensors",
    "reference_logits",
    "respell",
    "saved_by_transformers",
    "write_checkpoint",
]
