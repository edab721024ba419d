"""One served demo for all tests that only ask it things, and OpenAI's own client for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from openai import OpenAI

from statewise import LLM
from tests.server.served import Served

KEYS = {"alice": "a-key-of-some-length", "bob": "another-key-of-some-length"}
QUEUED = 16


@pytest.fixture(scope="package")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with two keys and room for `QUEUED` requests; its `client` is alice."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("".join(f"{name}: {key}\n" for name, key in KEYS.items()))
    keys.chmod(0o600)
    server = Served("--api-key-file", str(keys), "--max-queued", str(QUEUED))
    try:
        server.client.headers["Authorization"] = f"Bearer {KEYS['alice']}"
        yield server.ready()
    finally:
        server.stop()


@pytest.fixture(scope="package")
def client(shared: Served) -> Iterator[OpenAI]:
    url = str(shared.client.base_url.join("/v1"))
    with OpenAI(base_url=url, api_key=KEYS["alice"], max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="package")
def offline() -> LLM:
    """The same model in this process."""
    return LLM("demo", dtype="float32")
