"""Which class was chosen for every kind of layer, in words."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from statewise.api.amounts import bytes_text, ranges_text

if TYPE_CHECKING:
    from statewise.api.model_summary import LayerSummary, ModelSummary

logger = logging.getLogger(__name__)


def log_selection(summary: ModelSummary) -> None:
    """Say at INFO what was chosen, for a program that keeps a log."""
    for line in selection_lines(summary):
        logger.info("%s", line)


def selection_lines(summary: ModelSummary) -> list[str]:
    """One line for each kind of layer, in the order in which the kinds appear in the model."""
    kinds: dict[tuple[str, ...], list[LayerSummary]] = {}
    for layer in summary.layers:
        kind = (layer.registered_name, layer.layer_class, layer.provider, layer.kernels, layer.details)
        kinds.setdefault(kind, []).append(layer)
    return [_line(layers, summary.dtype) for layers in kinds.values()]


def _line(layers: list[LayerSummary], dtype: str) -> str:
    first = layers[0]
    if first.page_bytes_per_token:
        state = f"{bytes_text(first.page_bytes_per_token)} per token"
    else:
        state = f"{bytes_text(first.state_bytes)} per sequence"
    state += " each" if len(layers) > 1 else ""
    where = ranges_text([layer.index for layer in layers])
    chosen = f"{first.registered_name} = {first.layer_class} ({first.provider})"
    served = "; ".join(filter(None, (first.kernels, first.details)))
    return f"layer{'s' if len(layers) > 1 else ''} {where}: {chosen}; {served}; {dtype}, {state}"
