"""What is told of a model: its layers, its size, what its state costs. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerSummary:
    """One decoder layer."""

    index: int
    kind: str  # state kind of the mixer
    registered_name: str
    layer_class: str  # module and class that serve the name
    provider: str  # `built in`, or the distribution of the plug-in and what it takes the place of
    feed_forward: str
    parameters: int
    state_bytes: int  # per sequence
    page_bytes_per_token: int
    kernels: str  # by type of device, what serves it
    details: str  # options of the layer that change its results; often empty


@dataclass(frozen=True)
class ModelSummary:
    """A model and its state. Bytes are per rank; `num_records` and `num_pages` are None without an engine."""

    name: str
    path: str
    architecture: str
    dtype: str
    parameters: int
    weight_bytes: int
    layers: list[LayerSummary]
    record_bytes: int
    page_bytes: int
    page_size: int
    max_length: int
    num_records: int | None = None
    num_pages: int | None = None
