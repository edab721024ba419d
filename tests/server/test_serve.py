"""`statewise serve` as a client sees it: real processes, a real socket, the demo model."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from statewise import LLM, SamplingParams
from tests.server.served import Served

ADD = [{"role": "user", "content": "What is 27 + 45?"}]
GREEDY = {"model": "demo", "temperature": 0}
BINARY = {"Content-Type": "application/octet-stream"}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    server = Served()
    try:
        yield server.ready()
    finally:
        server.stop()


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("demo", dtype="float32")


def events(response: httpx.Response) -> Iterator[Any]:
    for line in response.iter_lines():
        if line.startswith("data: "):
            yield line[6:] if line == "data: [DONE]" else json.loads(line[6:])


def test_a_chat_is_answered_whole_and_in_a_stream(served: Served) -> None:
    whole = served.client.post("/v1/chat/completions", json={**GREEDY, "messages": ADD}).json()
    text = whole["choices"][0]["message"]["content"]
    assert (text, whole["choices"][0]["finish_reason"]) == ("27 + 45 = 72", "stop")
    body = {**GREEDY, "messages": ADD, "stream": True, "stream_options": {"include_usage": True}}
    with served.client.stream("POST", "/v1/chat/completions", json=body) as response:
        *chunks, done = events(response)
    assert done == "[DONE]"
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"]) == text
    assert [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]][-1] == "stop"
    usage = chunks[-1]["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] == whole["usage"]["prompt_tokens"]


def test_completions_are_those_of_the_engine(served: Served, llm: LLM) -> None:
    assert llm.tokenizer is not None
    prompts = ["The people of the", "In the year"]
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=12, n=2)
    expected = [one.text for output in llm.generate(prompts, params) for one in output.outputs]
    body = {"model": "demo", "prompt": prompts, "temperature": 0.8, "seed": 3, "max_tokens": 12, "n": 2}
    choices = served.client.post("/v1/completions", json=body).json()["choices"]
    assert [choice["text"] for choice in choices] == expected
    body["prompt"] = [llm.tokenizer.encode(text) for text in prompts]
    with served.client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        texts = [""] * 4
        for event in events(response):
            for choice in event["choices"] if event != "[DONE]" else ():
                texts[choice["index"]] += choice["text"]
    assert texts == expected


def test_echo_has_the_log_probabilities_of_the_prompt(served: Served) -> None:
    body = {**GREEDY, "prompt": "The people of the", "max_tokens": 1, "echo": True, "logprobs": 1}
    (choice,) = served.client.post("/v1/completions", json=body).json()["choices"]
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"][0] is None
    assert all(one < 0 for one in logprobs["token_logprobs"][1:])
    assert "".join(logprobs["tokens"]) == choice["text"]
    for at, token in zip(logprobs["text_offset"], logprobs["tokens"], strict=True):
        assert choice["text"][at:].startswith(token)


def test_a_session_is_forked_rewound_exported_and_taken_up(served: Served) -> None:
    client = served.client
    fact = [{"role": "user", "content": "Remember this: the key of Ada Lark is blue."}]
    session = client.post("/v1/sessions", json={"messages": fact}).json()
    first = client.post("/v1/chat/completions", json={**GREEDY, "session_id": session["id"], "messages": ADD})
    assert first.status_code == 200
    shown = client.get(f"/v1/sessions/{session['id']}").json()
    assert len(shown["turns"]) == 3 and shown["num_tokens"] == shown["turns"][-1]
    (fork,) = client.post(f"/v1/sessions/{session['id']}/fork", json={}).json()["data"]
    assert fork["num_tokens"] == shown["num_tokens"]
    back = client.post(f"/v1/sessions/{fork['id']}/rewind", json={"turn": 0}).json()
    assert back["num_tokens"] == shown["turns"][0]
    named = client.post(f"/v1/sessions/{fork['id']}/checkpoint", json={"name": "fact"}).json()
    assert named["checkpoints"] == {"fact": shown["turns"][0]}
    content = client.get(f"/v1/sessions/{session['id']}/export").content
    taken = client.post("/v1/sessions/import", content=content, headers=BINARY).json()
    assert (taken["num_tokens"], taken["turns"]) == (shown["num_tokens"], shown["turns"])
    altered = content[:-1] + bytes([content[-1] ^ 1])
    forged = client.post("/v1/sessions/import", content=altered, headers=BINARY)
    assert (forged.status_code, forged.json()["error"]["param"]) == (400, "file")
    for name in (session["id"], fork["id"], taken["id"]):
        assert client.delete(f"/v1/sessions/{name}").status_code == 200
        assert client.get(f"/v1/sessions/{name}").status_code == 404


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/v1/completions", {"prompt": "a", "model": "other"}, 404, "model"),
        ("/v1/completions", {"prompt": []}, 400, "prompt"),
        ("/v1/completions", {"prompt": [1 << 40]}, 400, "prompt"),
        ("/v1/completions", {"prompt": [5] * 100_000}, 400, "prompt"),
        ("/v1/completions", {"prompt": "a", "n": 0}, 400, "n"),
        ("/v1/completions", {"prompt": ["a"] * 128, "n": 128}, 400, "n"),
        ("/v1/completions", {"prompt": "a", "temperature": -1}, 400, "temperature"),
        ("/v1/completions", {"prompt": "a", "suffix": "b"}, 400, "suffix"),
        ("/v1/completions", {"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias"),
        ("/v1/completions", {"prompt": "a", "stop": ["x"] * 17}, 400, "stop"),
        ("/v1/completions", {"prompt": "a", "best_of": 2, "stream": True}, 400, "best_of"),
        ("/v1/chat/completions", {"messages": []}, 400, "messages"),
        ("/v1/chat/completions", {"messages": ADD, "session_id": "../x"}, 404, "session_id"),
        ("/v1/sessions", {"text": "a", "token_ids": [1]}, 400, "text"),
        ("/tokenize", {}, 400, "prompt"),
        ("/detokenize", {"tokens": [-1]}, 400, "prompt"),
    ],
)
def test_a_bad_request_is_told_what_to_change(served: Served, path: str, body: Any, status: int, param: str) -> None:
    response = served.client.post(path, json=body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["param"] == param and error["message"]


def test_a_client_that_leaves_frees_its_request(served: Served) -> None:
    body = {**GREEDY, "prompt": "The", "max_tokens": 3000, "ignore_eos": True, "stream": True}
    with served.client.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())
    begin = time.monotonic()
    served.client.post("/v1/completions", json={**GREEDY, "prompt": "A", "max_tokens": 2})
    assert time.monotonic() - begin < 10
    with pytest.raises(httpx.ReadTimeout):
        served.client.post("/v1/completions", json={**body, "stream": False}, timeout=0.5)
    assert served.client.post("/v1/completions", json={**GREEDY, "prompt": "A", "max_tokens": 2}).status_code == 200


def test_an_engine_that_dies_ends_its_streams_and_comes_back() -> None:
    server = Served("--restart-engine").ready()
    try:
        body = {**GREEDY, "prompt": "The", "max_tokens": 4000, "ignore_eos": True, "stream": True}
        with server.client.stream("POST", "/v1/completions", json=body) as response:
            lines = events(response)
            next(lines)
            os.kill(server.engine_pid(), signal.SIGKILL)
            *_, error, done = lines
        assert (error["error"]["code"], done) == ("engine_dead", "[DONE]")
        server.ready()
        again = server.client.post("/v1/chat/completions", json={**GREEDY, "messages": ADD}).json()
        assert again["choices"][0]["message"]["content"] == "27 + 45 = 72"
    finally:
        assert server.stop() == 0


def test_keys_are_asked_for_and_a_dead_engine_shows(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alice: a-key-of-some-length\n")
    keys.chmod(0o600)
    server = Served("--api-key-file", str(keys))
    try:
        assert server.client.get("/v1/models").status_code == 401
        server.client.headers["Authorization"] = "Bearer a-key-of-some-length"
        server.ready()
        assert server.client.get("/v1/models").json()["data"][0]["id"] == "demo"
        os.kill(server.engine_pid(), signal.SIGKILL)
        server.until(lambda: server.client.get("/health").status_code == 503)
        refused = server.client.post("/v1/completions", json={"prompt": "a"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_dead")
    finally:
        assert server.stop() == 0
