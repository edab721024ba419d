"""Samples of plain numbers, as Prometheus's client writes them out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from statewise.server.metrics_tally import Tally

Samples = Mapping[Any, float]
"""Values by the values of their labels, a tuple of text."""


def _family(kind: Callable[..., Metric], name: str, text: str, labels: Sequence[str], samples: Samples) -> Metric:
    family = kind(name, text, labels=labels)
    for values, value in samples.items():
        family.add_metric(values, float(value))  # type: ignore[attr-defined]
    return family


def gauge(name: str, text: str, labels: Sequence[str], samples: Samples) -> Metric:
    return _family(GaugeMetricFamily, name, text, labels, samples)


def counter(name: str, text: str, labels: Sequence[str], samples: Samples) -> Metric:
    """Exported as NAME_total."""
    return _family(CounterMetricFamily, name, text, labels, samples)


def plain(name: str, text: str, value: float) -> Metric:
    return gauge(name, text, (), {(): value})


def total(name: str, text: str, value: float) -> Metric:
    return counter(name, text, (), {(): value})


def histogram(name: str, text: str, labels: Sequence[str], tallies: Mapping[Any, Tally]) -> Metric:
    family = HistogramMetricFamily(name, text, labels=labels)
    for values, tally in tallies.items():
        bounds = [*map(floatToGoString, tally.bounds), "+Inf"]
        family.add_metric(values, list(zip(bounds, accumulate(tally.counts))), tally.total)
    return family
