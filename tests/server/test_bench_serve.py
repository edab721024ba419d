"""`statewise bench serve` against servers that a test writes, and against a served demo."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from statewise.cli import main
from statewise.traffic.workload import WORDS
from tests.server.served import Served

KEY = "a-key-of-some-length"


class Fake:
    """A server with OpenAI's API that answers `max_tokens` words, and does what a request's `behave` asks for."""

    def __init__(self) -> None:
        self.bodies: list[Any] = []
        self.asked: list[str] = []
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._started.wait(30)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._handle, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._started.set()
        self._loop.run_forever()
        server.close()
        left = asyncio.all_tasks(self._loop)
        for task in left:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        self._loop.close()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = re.search(r"content-length: (\d+)", head, re.IGNORECASE)
                body = json.loads(await reader.readexactly(int(length[1]))) if length else None
                method, path, _ = head.split(" ", 2)
                await self._answer(writer, f"{method} {path}", head, body)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, asked: str, head: str, body: Any) -> None:
        self.asked.append(asked)
        if "/locked/" in asked and f"Authorization: Bearer {KEY}" not in head:
            self._plain(writer, 401, {"error": {"message": "no key", "code": "invalid_api_key"}})
        elif asked.endswith(("GET /v1/models", "/locked/v1/models")):
            self._plain(writer, 200, {"data": [{"id": "fake"}, {"id": "other"}]})
        elif asked == "POST /tokenize":
            ids = [len(word) for word in body["prompt"].split() for _ in "ab"]
            self._plain(writer, 200, {"tokens": ids, "count": len(ids)})
        elif asked.endswith("completions"):
            self.bodies.append(body)
            await self._complete(writer, body, "chat" in asked)
        else:
            self._plain(writer, 404, {"detail": "Not Found"})

    def _plain(self, writer: asyncio.StreamWriter, status: int, value: Any) -> None:
        content = json.dumps(value).encode()
        writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, len(content)) + content)

    async def _complete(self, writer: asyncio.StreamWriter, body: Any, chat: bool) -> None:
        behave = body.get("behave")
        if behave == "busy" or (behave == "sometimes" and len(self.bodies) % 2):
            self._plain(writer, 503, {"error": {"message": "come back later", "code": "overloaded"}})
            return
        if behave == "whole":
            self._plain(writer, 200, {"choices": [{"text": "all at once"}]})
            return
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        for _ in range(body["max_tokens"] // 2):  # two tokens in each event
            choice = {"delta": {"content": " a b"}} if chat else {"text": " a b"}
            self._event(writer, {"choices": [{"index": 0, **choice, "finish_reason": None}]})
            await asyncio.sleep(0)
        if behave == "die":
            self._event(writer, {"error": {"message": "the engine died", "code": "engine_dead"}})
        elif behave != "cut":
            self._event(writer, {"choices": [{"index": 0, "text": "", "delta": {}, "finish_reason": "length"}]})
        if behave is None or behave == "sometimes":
            details = {"cached_tokens": 5}
            usage = {"prompt_tokens": 20, "completion_tokens": body["max_tokens"], "prompt_tokens_details": details}
            self._event(writer, {"choices": [], "usage": usage})
        if behave != "cut":
            writer.write(b"data: [DONE]\n\n")
        await writer.drain()
        writer.close()

    def _event(self, writer: asyncio.StreamWriter, value: Any) -> None:
        writer.write(b"data: " + json.dumps(value).encode() + b"\n\n")


@pytest.fixture
def fake() -> Iterator[Fake]:
    server = Fake()
    try:
        yield server
    finally:
        server.close()


def bench(*arguments: object, environment: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(main, ["bench", "serve", *map(str, arguments)], env=environment)


def measured(*arguments: object) -> dict[str, Any]:
    result = bench(*arguments, "--json", "-")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_counts_are_the_servers_and_the_settings_are_kept(fake: Fake, tmp_path: Path) -> None:
    plot = tmp_path / "plot.svg"
    options = ("--num-requests", 20, "--concurrency", 3, "--output-tokens", 8, "--seed", 5, "--plot", plot, "--records")
    found = measured(fake.url, *options, "--temperature", 0, "--set", "top_k=4", "--ignore-eos")
    report = found["report"]
    assert (report["completed"], report["failed"], report["peak_concurrency"]) == (20, 0, 3)
    assert (report["prompt_tokens"], report["output_tokens"], report["cached_tokens"]) == (400, 160, 100)
    assert (report["cached_share"], report["events_per_token"], report["uncounted"]) == (0.25, 0.5, 0)
    assert report["per_token"]["count"] == report["total"]["count"] == 20
    assert report["between_events"]["count"] == 60
    assert (found["model"], found["settings"]["seed"], found["settings"]["prompts"]) == ("fake", 5, "token ids")
    assert len(found["records"]) == 20
    assert all(one["events"] == 4 and one["completion_tokens"] == 8 for one in found["records"])
    assert plot.read_text().startswith("<svg ")
    assert len(fake.bodies) == 21  # one to warm up
    lengths = {len(word) for word in WORDS}
    for body in fake.bodies:
        assert body["stream_options"] == {"include_usage": True}
        assert (body["temperature"], body["top_k"], body["ignore_eos"], body["max_tokens"]) == (0, 4, True, 8)
        assert len(body["prompt"]) == 256
        assert set(body["prompt"]) <= lengths


def test_a_table_is_printed_for_people(fake: Fake, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    result = bench(fake.url, "--request-rate", 200, "--num-requests", 10, "--json", file)
    assert result.exit_code == 0, result.output
    for word in ("time to first token", "from its intended start", "p99", "10 requests answered", "25% of them cached"):
        assert word in result.stdout
    assert json.loads(file.read_text())["report"]["completed"] == 10


def test_a_chat_of_turns_repeats_what_was_said(fake: Fake) -> None:
    options = ("--turns", 3, "--num-requests", 5, "--concurrency", 1, "--output-tokens", 4, "--warm-up", 0)
    measured(fake.url, "--endpoint", "chat", *options, "--prompt-tokens", "10:20", "--shared-prefix-tokens", 30)
    talks = [body["messages"] for body in fake.bodies]
    assert [len(talk) for talk in talks] == [1, 3, 5, 1, 3]  # the last is cut at the number of requests
    assert talks[2][:3] == talks[1]
    assert talks[1][1] == {"role": "assistant", "content": " a b a b"}
    assert talks[0][0]["content"].split()[:15] == talks[3][0]["content"].split()[:15]
    assert 20 <= len(talks[0][0]["content"].split()) <= 25  # two tokens a word


def test_a_prompt_file_says_what_is_asked(fake: Fake, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}\n')
    measured(fake.url, "--prompt-file", path, "--num-requests", 3)
    assert [(body["messages"][0]["content"], body["max_tokens"]) for body in fake.bodies] == [("Hi", 4)] * 4
    refused = bench(fake.url, "--prompt-file", path, "--endpoint", "completions")
    assert (refused.exit_code, "--endpoint chat" in refused.output) == (2, True)


@pytest.mark.parametrize(
    ("behave", "kind", "message"),
    [
        ("busy", "status 503 overloaded", "come back later"),
        ("die", "error event engine_dead", "the engine died"),
        ("cut", "cut short", "without a finish reason"),
        ("whole", "no stream", "no stream of events"),
    ],
)
def test_failures_are_counted_by_kind_and_none_answered_is_a_failure(
    fake: Fake, tmp_path: Path, behave: str, kind: str, message: str
) -> None:
    file = tmp_path / "result.json"
    options = ("--set", f"behave={behave}", "--num-requests", 4, "--output-tokens", 4)
    result = bench(fake.url, *options, "--warm-up", 0, "--json", file)
    assert result.exit_code == 1, result.output
    assert f"4 × {kind}: " in result.stderr
    (error,) = json.loads(file.read_text())["report"]["errors"]
    assert (error["kind"], error["count"]) == (kind, 4)
    assert message in error["message"]
    warm = bench(fake.url, *options)
    assert (warm.exit_code, warm.stderr.count("\n")) == (1, 1)
    assert "warm-up" in warm.stderr
    assert message in warm.stderr


def test_some_failures_do_not_spoil_the_rest(fake: Fake) -> None:
    report = measured(fake.url, "--set", "behave=sometimes", "--num-requests", 10, "--warm-up", 0)["report"]
    assert (report["completed"], report["failed"], report["total"]["count"]) == (5, 5, 5)


def test_a_server_that_counts_nothing_is_told_apart(fake: Fake) -> None:
    result = bench(fake.url, "--set", "behave=uncounted", "--num-requests", 3, "--output-tokens", 4)
    assert result.exit_code == 0, result.output
    assert "3 answers came without token counts" in result.stderr


def test_keys_come_from_a_file_or_the_environment(fake: Fake, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"# ours\nalice: {KEY}\n")
    url = f"{fake.url}/locked"
    for result in (
        bench(url, "--num-requests", 1, "--api-key-file", keys),
        bench(url, "--num-requests", 1, environment={"STATEWISE_API_KEY": KEY}),
    ):
        assert result.exit_code == 0, result.output
    missing = bench(url, environment={"STATEWISE_API_KEY": ""})
    wrong = bench(url, environment={"STATEWISE_API_KEY": "wrong"})
    assert (missing.exit_code, "wants an API key" in missing.stderr) == (1, True)
    assert (wrong.exit_code, "refuses the API key" in wrong.stderr) == (1, True)
    assert "wrong" not in wrong.stderr


def test_a_server_that_cannot_be_measured_is_told_in_a_sentence(fake: Fake) -> None:
    for arguments, word in (
        (("http://127.0.0.1:1",), "refused"),
        ((f"{fake.url}/chat/completions",), "has no /v1/models"),
        ((fake.url, "--model", "none"), "fake, other"),
        ((fake.url, "--sessions"), "leave --sessions out"),
        (("nonsense://x",), "write it like"),
    ):
        result = bench(*arguments)
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1), result.output
        assert word in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("--prompt-tokens", "9:3"),
        ("--prompt-tokens", "a"),
        ("--output-tokens", "1:2:3"),
        ("--request-rate", "-1"),
        ("--plot", "plot.png"),
        ("--json", "/nowhere/at/all.json"),
        ("--duration", "0"),
    ],
)
def test_options_without_sense_are_refused_before_anything_is_sent(fake: Fake, arguments: tuple[str, ...]) -> None:
    assert bench(fake.url, *arguments).exit_code == 2
    assert not fake.asked


def test_a_served_demo_is_measured() -> None:
    served = Served().ready()
    try:
        url = str(served.client.base_url)
        few = (
            "--num-requests",
            12,
            "--concurrency",
            4,
            "--prompt-tokens",
            "40:60",
            "--output-tokens",
            6,
            "--ignore-eos",
        )
        found = measured(url, *few, "--shared-prefix-tokens", 128)
        report = found["report"]
        assert (found["model"], report["completed"], report["output_tokens"], report["uncounted"]) == (
            "demo",
            12,
            72,
            0,
        )
        assert 12 * 168 <= report["prompt_tokens"] <= 12 * 188
        assert report["cached_share"] > 0.4
        chats = ("--endpoint", "chat", "--turns", 3, "--num-requests", 6, "--concurrency", 2, "--sessions")
        report = measured(url, *chats, "--prompt-tokens", 30, "--output-tokens", 6)["report"]
        assert (report["completed"], report["failed"]) == (6, 0)
        long = bench(url, "--prompt-tokens", 1_000_000)
        assert (long.exit_code, "maximum context length" in long.stderr) == (1, True)
    finally:
        served.stop()
