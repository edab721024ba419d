"""A served demo that is watched: its metrics, over the death of its engine, its dashboard and its log."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.figures import Figures, figures, value
from tests.server.served import Served

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "statewise.json"
KEY = "a-key-of-some-length"
GREEDY = {"model": "demo", "temperature": 0}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"alice: {KEY}\n")
    keys.chmod(0o600)
    server = Served("--log-json", "--restart-engine", "--api-key-file", str(keys))
    try:
        server.client.headers["Authorization"] = f"Bearer {KEY}"
        yield server.ready()
    finally:
        server.stop()


def asked_for(server: Served) -> Figures:
    return figures(server.client.get("/metrics").text)


def test_a_served_model_counts_what_it_did(served: Served) -> None:
    assert served.client.get("/metrics", headers={"Authorization": "Bearer none"}).status_code == 401
    body = {**GREEDY, "prompt": "The people of the", "max_tokens": 8, "ignore_eos": True}
    answers = [served.client.post("/v1/completions", json=body).json() for _ in range(2)]
    prompt = answers[0]["usage"]["prompt_tokens"]
    served.until(lambda: value(asked_for(served), "vllm:generation_tokens_total") == 16)
    found = asked_for(served)
    assert value(found, "vllm:prompt_tokens_total") == 2 * prompt
    assert value(found, "vllm:prefix_cache_hits_total") == prompt
    assert value(found, "vllm:request_success_total", finished_reason="length") == 2
    assert value(found, "vllm:inter_token_latency_seconds_count") == 14
    assert value(found, "vllm:iteration_tokens_total_sum") == value(found, "statewise:computed_tokens_total")
    assert value(found, "statewise:cache_misses_total", reason="no_common_prefix") == 1
    assert value(found, "statewise:cache_misses_total", reason="other") == 0
    assert value(found, "statewise:step_seconds_count") >= 15
    assert value(found, "statewise:checkpoints", tier="device") > 0
    assert value(found, "statewise_engine_process_resident_memory_bytes") > 1e6


def test_the_dashboard_asks_for_nothing_that_is_not_exported(served: Served) -> None:
    names: dict[str, set[str]] = {}
    for name, labels in asked_for(served):
        names.setdefault(name, {"job", "instance"}).update(dict(labels))
    dashboard = json.loads(DASHBOARD.read_text())
    targets = [target for panel in dashboard["panels"] for target in panel.get("targets", ())]
    queries = [target["expr"] for target in targets]
    queries += [one["query"]["query"] for one in dashboard["templating"]["list"] if one["type"] == "query"]
    assert len(queries) > 30
    for query in queries:
        asked = re.findall(r"\b((?:vllm|statewise|process)[a-z0-9_]*(?::[a-z0-9_]+)?)(?:\{([^}]*)\})?", query)
        assert asked, query
        for name, selector in asked:
            assert name in names, f"{name} in {query}"
            assert set(re.findall(r"(\w+)[=!]", selector)) <= names[name], query
        for grouped in re.findall(r"by \(([^)]*)\)", query):
            assert {label.strip() for label in grouped.split(",")} <= names[asked[0][0]], query
    for panel in dashboard["panels"]:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24


def test_nothing_goes_back_when_the_engine_dies(served: Served) -> None:
    before = asked_for(served)
    os.kill(served.engine_pid(), signal.SIGKILL)
    served.until(lambda: served.client.get("/ready").status_code == 503)
    during = asked_for(served)
    served.ready()
    served.client.post("/v1/completions", json={**GREEDY, "prompt": "In", "max_tokens": 3, "ignore_eos": True})
    expected = value(before, "vllm:generation_tokens_total") + 3
    served.until(lambda: value(asked_for(served), "vllm:generation_tokens_total") == expected)
    after = asked_for(served)
    assert value(after, "statewise:engine_restarts_total") == 1
    for earlier, later in ((before, during), (during, after)):
        for (name, labels), was in earlier.items():
            if name.endswith(("_total", "_bucket", "_count", "_sum")) and "_process_" not in name:
                assert later[name, labels] >= was, name


def test_every_line_of_its_log_is_an_object(served: Served) -> None:
    lines = [json.loads(line) for line in served.log]
    assert {line["process"] for line in lines} >= {"server"}
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    (ready,) = [line for line in lines if line["message"] == "ready"]
    assert ready["model"].startswith("demo: ") and len(ready["layers"]) == 2
    access = [line for line in lines if line.get("path") == "/v1/completions"]
    assert access and all(line["request_id"] and line["key"] == "alice" for line in access)
    assert access[0]["prompt_tokens"] > 0 and KEY not in "".join(served.log)
    assert "people" not in "".join(served.log)
