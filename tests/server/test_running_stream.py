"""Requests that mean harm, against a real server, while it writes a long answer for somebody else.

Each is refused within a second, but for a few that are merely large and may be served; and the answer beside them is
the one that is written alone.
"""

from __future__ import annotations

import json
import select
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.server.conftest import KEYS
from tests.server.hostile_cases import CASES, Case, forged
from tests.server.served import Served

SECONDS = 1.0  # for a refusal
TRIES = 3  # on a machine that has other things to do
LONG = {"model": "demo", "prompt": "In the year", "temperature": 0.8, "seed": 11, "max_tokens": 800, "ignore_eos": True}


class Beside:
    """A client that asks for the same long answer again and again."""

    def __init__(self, served: Served) -> None:
        self._client = httpx.Client(base_url=served.client.base_url, headers=served.client.headers, timeout=120)
        self._stop = threading.Event()
        self.alone = self._ask()
        self.texts: list[str] = []
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _ask(self) -> str:
        text = ""
        with self._client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
        return text

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self.texts.append(self._ask())
        except BaseException as error:
            self.failure = error

    def end(self) -> None:
        """Wait for the answer that is being written."""
        self._stop.set()
        self._thread.join(120)
        self._client.close()


@pytest.fixture(scope="module")
def beside(shared: Served) -> Iterator[Beside]:
    one = Beside(shared)
    yield one
    one.end()


def ask(served: Served, case: Case) -> tuple[int, dict[str, Any] | None, float]:
    """Status, error and seconds. The connection is a new one; an answer may come before all is sent."""
    url = served.client.base_url
    begin = time.monotonic()
    with socket.create_connection((url.host, url.port), timeout=30) as connection:
        try:
            for piece in spelled(case, f"{url.host}:{url.port}"):
                for at in range(0, len(piece), 1 << 18):
                    if select.select([connection], [], [], 0)[0]:
                        break  # the server has said what it thinks of it
                    connection.sendall(piece[at : at + (1 << 18)])
        except (BrokenPipeError, ConnectionResetError):
            pass
        answer = b""
        try:
            while piece := connection.recv(1 << 16):
                answer += piece
        except ConnectionResetError:
            pass
    seconds = time.monotonic() - begin
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 "), answer[:200]
    return int(head.split()[1]), json.loads(body).get("error"), seconds


def spelled(case: Case, host: str) -> Iterator[bytes]:
    """The request as it goes over the wire."""
    if case.raw is not None:
        yield case.raw
        return
    headers = {"Host": host, "Connection": "close", "Authorization": f"Bearer {KEYS['alice']}"}
    if case.kind is not None:
        headers["Content-Type"] = case.kind
    if case.pieces is not None:
        headers["Transfer-Encoding"] = "chunked"
    elif case.body is not None:
        headers["Content-Length"] = str(len(case.body))
    headers |= case.headers
    lines = [f"{case.method} {case.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    yield "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"
    if case.body is not None:
        yield case.body
    for piece in case.pieces or ():
        yield b"%x\r\n%b\r\n" % (len(piece), piece)


def check(served: Served, beside: Beside, case: Case) -> None:
    expected = case.status if isinstance(case.status, tuple) else (case.status,)
    times = []
    while len(times) < TRIES:
        status, error, seconds = ask(served, case)
        assert status in expected, error
        if error is not None:
            assert set(error) == {"message", "type", "param", "code"}
            assert 0 < len(error["message"]) <= 1000
        assert beside.failure is None
        times.append(seconds)
        if seconds <= SECONDS:
            return
    raise AssertionError(f"refused in {min(times):.2f} s")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_harm_is_refused(shared: Served, beside: Beside, case: Case) -> None:
    check(shared, beside, case)


def test_forged_snapshots_are_refused(shared: Served, beside: Beside) -> None:
    client = shared.client
    session = client.post("/v1/sessions", json={"text": "In the year of our Lord"}).json()["id"]
    snapshot = client.get(f"/v1/sessions/{session}/export").content
    for case in forged(snapshot):
        check(shared, beside, case)
    binary = {"Content-Type": "application/octet-stream"}
    for content in (snapshot, snapshot):  # what was not forged is taken, as often as it comes
        assert client.post("/v1/sessions/import", content=content, headers=binary).status_code == 201


def test_the_answer_beside_is_the_one_that_is_written_alone(shared: Served, beside: Beside) -> None:
    beside.end()
    assert beside.failure is None
    assert beside.texts
    assert set(beside.texts) == {beside.alone}
    assert shared.client.get("/ready").status_code == 200
