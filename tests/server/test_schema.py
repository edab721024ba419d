"""The OpenAPI document: what it says of every operation, and that the server keeps to it whatever it is sent."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.served import Served

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
    "response_headers_conformance,unsupported_method"
)
LARGE = 2000  # characters or entries; beyond, test_running_stream.py does the asking


@pytest.fixture(scope="module")
def small() -> Iterator[Served]:
    """A server whose answers are short."""
    server = Served("--max-length", "24")
    try:
        yield server.ready()
    finally:
        server.stop()


@pytest.fixture(scope="module")
def document(small: Served) -> dict[str, Any]:
    found: dict[str, Any] = small.client.get("/openapi.json").json()
    return found


def operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"{method} {path}", operation


def test_every_operation_says_what_it_answers_and_what_it_refuses(document: dict[str, Any]) -> None:
    listed = dict(operations(document))
    assert len(listed) >= 25
    for name, operation in listed.items():
        assert operation["tags"] and operation["summary"], name
        answers = operation["responses"]
        assert "422" not in answers, name
        assert any(status in answers for status in ("200", "201")), name
        for status, answer in answers.items():
            for kind, content in answer["content"].items():
                assert content["schema"], (name, status, kind)
        for status in ("400", "500"):
            assert answers[status]["content"]["application/json"]["schema"]["$ref"].endswith("/Error")
        assert ("401" in answers) == (name != "get /health"), name
        if "requestBody" in operation:
            assert "413" in answers, name
    for name in ("post /v1/chat/completions", "post /v1/completions", "post /v1/responses"):
        assert {"404", "409", "503"} <= set(listed[name]["responses"])
        assert "text/event-stream" in listed[name]["responses"]["200"]["content"]
        fields = document["components"]["schemas"][
            listed[name]["requestBody"]["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
        ]["properties"]
        for field in ("session_id", "cache_breakpoints", "cache_salt"):
            assert fields[field]["description"], (name, field)
    assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    schemas = set(document["components"]["schemas"])
    text = json.dumps(document)
    assert {part.split('"', 1)[0] for part in text.split("#/components/schemas/")[1:]} <= schemas


def test_no_page_is_served_that_loads_from_elsewhere(small: Served) -> None:
    for path in ("/docs", "/redoc", "/docs/oauth2-redirect"):
        assert small.client.get(path).status_code == 404


def test_clients_that_render_prompts_themselves_are_told_how(small: Served) -> None:
    told = small.client.get("/tokenizer_info").json()
    tokens = small.client.post("/tokenize", json={"prompt": told["eos_token"]}).json()["tokens"]
    assert len(tokens) == 1 and 0 <= tokens[0] < told["vocab_size"]
    assert told["eos_token"] in told["chat_template"]
    assert told["model_max_length"] == 24


def test_the_server_keeps_to_its_document(small: Served, document: dict[str, Any], tmp_path: Path) -> None:
    """Examples, the edges of every field, and a few random requests of each operation."""
    schema = tmp_path / "openapi.json"
    schema.write_text(json.dumps(without_large(document)))
    command = [sys.executable, "-m", "schemathesis.cli", "run", str(schema), "--url", str(small.client.base_url)]
    command += ["--phases", "examples,coverage,fuzzing", "--max-examples", "3", "--seed", "1", "--checks", CHECKS]
    command += ["--request-timeout", "30", "--continue-on-failure", "--generation-database", "none"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert small.client.get("/ready").status_code == 200
    stats = small.client.get("/v1/statewise/stats").json()
    assert stats["running"] + stats["waiting"] == 0


def without_large(value: Any) -> Any:
    """Without the bounds whose edges are megabytes."""
    if isinstance(value, dict):
        large = {name for name in ("maxLength", "maxItems", "maxProperties") if value.get(name, 0) > LARGE}
        return {key: without_large(inner) for key, inner in value.items() if key not in large}
    return [without_large(one) for one in value] if isinstance(value, list) else value
