"""The page's files, their headers, and what can be had without a key; the numbers that the page shows."""

from __future__ import annotations

import re

import pytest
from starlette.types import ASGIApp

from statewise.server.app import create_app
from statewise.server.engine_client import EngineClient
from statewise.server.guards.stack import GuardSettings, guarded
from statewise.server.keys import load_keys
from statewise.server.page import ASSETS, PATHS, TYPES
from statewise.server.settings import ServerSettings
from tests.server.probes import BEARER, KEY, LOCAL, asked
from tests.server.served import Served

TEXTS = {path: content.decode() for path, (_, content) in ASSETS.items()}
MAX_LINES = 300


def served_app(page: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> ASGIApp:
    """An application with keys whose engine is not there."""
    monkeypatch.setattr("tempfile.mkdtemp", lambda **_: str(tmp_path))
    app = create_app(EngineClient("demo", {}), None, ServerSettings("demo", page=page))
    open_paths = ("/health", *PATHS) if page else ("/health",)
    return guarded(app, GuardSettings(keys=load_keys([KEY]), open_paths=open_paths))


@pytest.fixture
def with_page(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> ASGIApp:
    return served_app(True, monkeypatch, tmp_path)


@pytest.mark.parametrize("path", PATHS)
def test_every_file_comes_without_a_key_and_keeps_to_itself(with_page: ASGIApp, path: str) -> None:
    answer = asked(with_page, path=path)
    assert answer.status == 200 and answer.body == ASSETS[path][1]
    headers = answer.headers
    assert headers["content-type"] == TYPES[".html" if path == "/" else path[path.rfind(".") :]]
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-cache"
    unchanged = asked(with_page, path=path, headers=[LOCAL, (b"if-none-match", headers["etag"].encode())])
    assert (unchanged.status, unchanged.body) == (304, b"")
    assert asked(with_page, "HEAD", path).status == 200


def test_data_still_needs_a_key(with_page: ASGIApp) -> None:
    for path in (
        "/v1/statewise/info",
        "/v1/statewise/stats",
        "/v1/models",
        "/v1/sessions",
        "/page/",
        "/page/../v1/models",
    ):
        assert asked(with_page, path=path).status == 401, path
    assert asked(with_page, "POST", "/").status == 401
    known = [LOCAL, BEARER]
    assert asked(with_page, path="/v1/statewise/stats", headers=known).status == 200
    assert asked(with_page, path="/v1/statewise/info", headers=known).status == 503  # the model is not there yet
    assert asked(with_page, path="/page/main.py", headers=known).status == 404


def test_no_page_is_no_page(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    app = served_app(False, monkeypatch, tmp_path)
    for path in PATHS:
        assert asked(app, path=path).status == 401
        assert asked(app, path=path, headers=[LOCAL, BEARER]).status == 404


def test_nothing_comes_from_elsewhere_and_nothing_is_inline() -> None:
    """What the policy would block at run time is not even written."""
    for path, text in TEXTS.items():
        links = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+", text)) - {"http://www.w3.org"}
        assert not links, path
        assert not re.search(r"\b(innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval)\b", text), path
    html = TEXTS["/"]
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", html)
    assert set(re.findall(r'(?:src|href)="([^"#]+)"', html)) <= {path.lstrip("/") for path in PATHS}


def test_scripts_are_modules_of_readable_size_that_find_each_other() -> None:
    for path, text in TEXTS.items():
        assert text.count("\n") < MAX_LINES, path
        assert {f"/page/{name}" for name in re.findall(r'from "\./([\w.]+)"', text)} <= ASSETS.keys(), path


def test_ids_are_unique_and_every_one_that_a_script_asks_for_is_there() -> None:
    ids = re.findall(r'\sid="([\w-]+)"', TEXTS["/"])
    assert len(ids) == len(set(ids))
    wanted = {name for text in TEXTS.values() for name in re.findall(r'byId\("([\w-]+)"\)', text)}
    assert wanted <= set(ids)
    referred = {
        name for value in re.findall(r'(?:aria-labelledby|for)="([^"]+)"', TEXTS["/"]) for name in value.split()
    }
    assert referred <= set(ids)


def test_the_model_is_told_in_numbers_that_agree(shared: Served) -> None:
    info = shared.client.get("/v1/statewise/info").json()
    assert [layer["scope"] for layer in info["layers"]] == ["record", "record", "record", "page"] * 2
    heads, width, item = 4, 64, 4  # of each layer of the demo model, in float32
    assert info["kv_bytes_per_token_if_all_softmax"] == len(info["layers"]) * 2 * heads * width * item
    assert info["own_attention"]["bytes_per_token"] == len(info["layers"]) * (128 + 16) * item
    assert info["page_bytes"] == 2 * (128 + 16) * item * info["page_size"]
    session = shared.client.post("/v1/sessions", json={"token_ids": [5] * (info["page_size"] + 1)}).json()
    assert session["bytes"] == info["record_bytes"] + 2 * info["page_bytes"]
    stats = shared.client.get("/v1/statewise/stats").json()
    assert stats["phase"] == "ready"
    assert stats["records"]["total"] == info["num_records"] and stats["pages"]["total"] == info["num_pages"]
