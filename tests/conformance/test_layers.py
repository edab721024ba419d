"""Every registered layer keeps its contract, and so does one that a third party would write."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from statewise.conformance import CHECKS, LayerContract, Subject, prove, run_check
from statewise.conformance.kit import DTYPES
from statewise.errors import ConfigError
from statewise.layers.mixer import Capabilities, TokenMixer
from statewise.layers.pluggable import PluggableLayer
from tests.conformance.retention import Retention


@cache
def subject(name: str, dtype: str) -> Subject:
    """Ours keep float32 rows to the bit whatever is beside them; the kit asks that of no other layer."""
    return Subject(PluggableLayer.get(name), DTYPES[dtype], long=512, exact=True)


@pytest.mark.parametrize("check", [check.name for check in CHECKS])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PluggableLayer.names())
def test_a_registered_layer_keeps_its_contract(name: str, dtype: str, check: str) -> None:
    finding = run_check(check, subject(name, dtype))
    assert finding.status in ("held", "not applicable"), finding.message


def test_the_checks_that_do_not_apply_are_few() -> None:
    """A check that skips every layer would prove nothing."""
    window, records = {"draft columns", "window order"}, {"chunk grid", "recycled record", "decay in silence"}
    conditional = window | records | {"bfloat16 records"}
    skipped = {
        name: {check for check in conditional if run_check(check, subject(name, "float32")).status == "not applicable"}
        for name in ("kimi_gated_delta_net_attention", "minimax_text_01_attention", "grouped_query_attention")
    }
    assert skipped == {
        "kimi_gated_delta_net_attention": set(),
        "minimax_text_01_attention": window,
        "grouped_query_attention": conditional,
    }
    assert run_check("long input", subject("grouped_query_attention", "float32")).status == "held"


class TestRetention(LayerContract):
    layer = Retention
    long = 256


def test_other_weights_and_inputs() -> None:
    report = prove(PluggableLayer.get("kimi_gated_delta_net_attention"), long=256, seed=2)
    assert report.passed, report.failed


def test_without_a_reference_what_needs_it_is_said_to_be_unchecked() -> None:
    class Unspecified(Retention):
        reference = TokenMixer.reference

    report = prove(Unspecified, ["float32"], long=64)
    assert report.passed
    unchecked = {finding.check for finding in report.findings if finding.status == "not checked"}
    assert unchecked == {"specification", "initial state", "decay in silence", "long input"}
    assert all("no reference()" in f.message for f in report.findings if f.check in unchecked)


def test_a_layer_that_lists_one_dtype_is_checked_in_that_one() -> None:
    class Precise(Retention):
        capabilities = Capabilities({"cpu": "torch"}, dtypes=(torch.float32,))

    statuses: dict[str, set[Any]] = {"float32": set(), "bfloat16": set()}
    for finding in prove(Precise, long=64).findings:
        statuses[finding.dtype].add(finding.status)
    assert statuses == {"float32": {"held", "not applicable"}, "bfloat16": {"not applicable"}}


def test_bad_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="runs on cpu only, not on 'cuda'"):
        prove(Retention, device="cuda")
    with pytest.raises(ConfigError, match="dtype 'int8' is not supported"):
        prove(Retention, ["int8"])
    with pytest.raises(ConfigError, match="no check is called 'speed'; there are: specification, any split"):
        prove(Retention, only=["speed"])
