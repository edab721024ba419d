"""`/v1/sessions` over an engine with a script: forks, shares of the store, files, and what a session keeps."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.types import Message

from statewise.api.conversation import Conversation
from statewise.memory.snapshot_transcript import MAX_TRANSCRIPT
from statewise.server import messages
from statewise.server.errors import ApiError
from statewise.server.session_file import CHUNK, SessionFile
from statewise.server.session_store import Sessions
from statewise.server.settings import ServerSettings
from tests.server.scripted import ScriptedEngine, scripted

Talk = Callable[[httpx.AsyncClient, ScriptedEngine], Awaitable[Any]]
HELLO = [{"role": "user", "content": "hello"}]
TEMPLATE = (
    "{% for tool in tools or [] %}<tool_call>{{ tool.function.name }}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


def run(talk: Talk, answer: str = "yes", **options: Any) -> Any:
    async def go() -> Any:
        async with scripted(lambda *_: answer, **options) as (client, engine):
            return await asyncio.wait_for(talk(client, engine), 60)

    return asyncio.run(go())


async def begin(client: httpx.AsyncClient, tenant: str | None = None, **body: Any) -> httpx.Response:
    return await client.post("/v1/sessions", json=body, headers={"x-tenant": tenant} if tenant else {})


def failure(response: httpx.Response) -> tuple[int, str, str]:
    error = response.json()["error"]
    return response.status_code, error["param"], error["message"]


# Forks


def test_the_engine_is_asked_once_for_all_forks() -> None:
    async def talk(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
        session = (await begin(client, token_ids=[5] * 3000)).json()
        engine.questions.clear()
        reply = await client.post(f"/v1/sessions/{session['id']}/fork", json={"n": 64})
        assert reply.status_code == 201
        assert [type(one) for one in engine.questions] == [messages.Frozen]
        forks = reply.json()["data"]
        assert len({one["id"] for one in forks}) == 64
        for one in forks:
            assert {**one, "id": 0, "created": 0, "parent": None} == {**session, "id": 0, "created": 0}
            assert one["parent"] == session["id"]
        await client.post(f"/v1/sessions/{forks[0]['id']}/append", json={"token_ids": [6]})
        lengths = [(await client.get(f"/v1/sessions/{one['id']}")).json()["num_tokens"] for one in (session, *forks)]
        assert lengths == [3000, 3001, *[3000] * 63]

    run(talk)


@pytest.mark.parametrize("n", [0, 65, 4096, -1])
def test_a_request_makes_64_forks_at_most(n: int) -> None:
    async def talk(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
        session = (await begin(client, text="a")).json()
        reply = await client.post(f"/v1/sessions/{session['id']}/fork", json={"n": n})
        assert failure(reply) == (400, "n", f"n must be an integer from 1 to 64, found {n}")

    run(talk)


def test_forks_of_a_long_talk_are_told_in_short() -> None:
    async def talk(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
        session = (await begin(client, messages=[{**HELLO[0], "extra": "e" * 100_000}])).json()
        reply = await client.post(f"/v1/sessions/{session['id']}/fork", json={"n": 64})
        first, *others = reply.json()["data"]
        assert len(reply.content) < 1 << 20
        assert first["messages"] == session["messages"]
        listed = (await client.get("/v1/sessions")).json()["data"]
        assert len(others) == 63 and all(one in listed for one in others)
        whole = (await client.get(f"/v1/sessions/{others[-1]['id']}")).json()
        assert whole["messages"] == session["messages"]

    run(talk)


# Shares of the store


def test_a_key_that_has_everything_makes_room_for_the_others() -> None:
    async def talk(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
        async def kept(tenant: str) -> list[str]:
            listed = (await client.get("/v1/sessions", headers={"x-tenant": tenant})).json()["data"]
            return [one["id"] for one in listed]

        greedy = [(await begin(client, "greedy")).json()["id"] for _ in range(8)]
        reply = await begin(client, "greedy")
        assert (reply.status_code, reply.json()["error"]["code"]) == (429, "sessions")
        assert await kept("greedy") == greedy  # nobody loses a session to one of its own
        await client.get(f"/v1/sessions/{greedy[0]}", headers={"x-tenant": "greedy"})
        modest = [(await begin(client, "modest")).json()["id"] for _ in range(2)]
        assert await kept("greedy") == [greedy[0], *greedy[3:]]  # without the two that were used longest ago
        fork = f"/v1/sessions/{modest[0]}/fork"
        reply = await client.post(fork, json={"n": 3}, headers={"x-tenant": "modest"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (429, "sessions")
        assert (len(await kept("greedy")), len(await kept("modest"))) == (6, 2)  # nothing in half
        reply = await client.post(fork, json={"n": 2}, headers={"x-tenant": "modest"})
        assert reply.status_code == 201
        assert (len(await kept("greedy")), len(await kept("modest"))) == (4, 4)
        for tenant in ("greedy", "modest"):  # equal shares stay as they are
            assert (await begin(client, tenant)).status_code == 429
        assert (await begin(client, "third")).status_code == 201

    run(talk, settings=ServerSettings("demo", max_sessions=8))


def test_a_session_in_use_is_not_taken_away() -> None:
    service: Any = SimpleNamespace(settings=ServerSettings("demo", max_sessions=3))
    sessions = Sessions(service)
    greedy = [sessions.add("greedy", Conversation()) for _ in range(3)]
    for one in greedy:
        sessions.begin(one)
    with pytest.raises(ApiError, match="delete some"):
        sessions.add("modest", Conversation())
    greedy[1].busy = False
    sessions.add("modest", Conversation())
    assert sessions.of("greedy") == [greedy[0], greedy[2]]


# Files


@pytest.mark.parametrize("wanted", [None, "bytes=abc", "bytes=999999999-", "bytes=0-3", "bytes=-1,5-"])
def test_an_export_is_the_whole_file_and_leaves_nothing(wanted: str | None) -> None:
    async def talk(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
        engine.padding = 3 * CHUNK
        session = (await begin(client, messages=HELLO)).json()
        path = f"/v1/sessions/{session['id']}"
        reply = await client.get(f"{path}/export", headers={"Range": wanted} if wanted else {})
        assert reply.status_code == 200 and len(reply.content) > engine.padding
        assert int(reply.headers["content-length"]) == len(reply.content)
        assert reply.headers["content-disposition"] == f'attachment; filename="{session["id"]}.state"'
        binary = {"Content-Type": "application/octet-stream"}
        taken = (await client.post("/v1/sessions/import", content=reply.content, headers=binary)).json()
        assert (taken["messages"], taken["turns"]) == (session["messages"], session["turns"])
        assert [one.name for one in engine.directory.iterdir() if one.suffix == ".state"] == []

    run(talk)


@pytest.mark.parametrize("stopped", [False, True], ids=["client", "server"])
def test_a_file_is_closed_when_nobody_takes_the_rest(stopped: bool) -> None:
    async def go() -> None:
        with tempfile.TemporaryFile() as file:
            file.write(bytes(4 * CHUNK))
            file.seek(0)
            half, sent = asyncio.Event(), 0

            async def receive() -> Message:
                await (asyncio.Event() if stopped else half).wait()
                return {"type": "http.disconnect"}

            async def send(message: Message) -> None:
                nonlocal sent
                sent += len(message.get("body", b""))
                if sent == 2 * CHUNK:
                    half.set()
                    await asyncio.Event().wait()  # a client that takes no more

            answering = asyncio.create_task(SessionFile(file, "a.state")({"type": "http"}, receive, send))
            await asyncio.wait_for(half.wait(), 30)
            if stopped:
                answering.cancel()
            await asyncio.wait([answering], timeout=30)
            assert file.closed and sent == 2 * CHUNK

    asyncio.run(go())


# What a session keeps


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else "end"


@pytest.mark.parametrize("extra", [nested(40), "e" * MAX_TRANSCRIPT, 1 << 64], ids=["deep", "long", "large"])
def test_messages_that_no_file_holds_are_refused_before_they_are_kept(extra: Any) -> None:
    async def talk(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
        session = (await begin(client, messages=HELLO)).json()
        said = [{**HELLO[0], "extra": extra}]
        path = f"/v1/sessions/{session['id']}"
        chat = {"session_id": session["id"], "messages": said}
        for reply in (
            await begin(client, messages=said),
            await client.post(f"{path}/append", json={"messages": said}),
            await client.post("/v1/chat/completions", json=chat),
        ):
            assert failure(reply)[:2] == (400, "messages")
        assert (await client.get(path)).json() == session
        assert (await client.get(f"{path}/export")).status_code == 200
        assert len((await client.get("/v1/sessions")).json()["data"]) == 1

    run(talk)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("parallel", [False, True])
def test_a_session_keeps_the_message_that_was_told(stream: bool, parallel: bool) -> None:
    async def talk(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
        session = (await begin(client)).json()
        body = {"session_id": session["id"], "messages": HELLO, "tools": [TOOL], "parallel_tool_calls": parallel}
        reply = await client.post("/v1/chat/completions", json={**body, "stream": stream})
        assert reply.status_code == 200, reply.text
        kept = (await client.get(f"/v1/sessions/{session['id']}")).json()["messages"]
        calls = kept[-1]["tool_calls"]
        assert len(calls) == 1 + parallel
        assert all(json.dumps(call["id"]) in reply.text for call in calls)
        assert [call["function"] for call in calls] == [{"name": "now", "arguments": "{}"}] * len(calls)

    run(talk, CALL + CALL, template=TEMPLATE)


def test_an_answer_that_a_completion_goes_on_with_is_one_message() -> None:
    async def talk(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
        session = (await begin(client)).json()
        await client.post("/v1/chat/completions", json={"session_id": session["id"], "messages": HELLO})
        await client.post("/v1/completions", json={"session_id": session["id"], "prompt": ""})
        kept = (await client.get(f"/v1/sessions/{session['id']}")).json()
        assert kept["messages"] == [*HELLO, {"role": "assistant", "content": "yesyes"}]
        assert kept["spoken"] == [1, 0, 2] and kept["turns"][-1] == kept["num_tokens"]

    run(talk)


def test_instructions_of_every_request_are_kept_once() -> None:
    async def talk(client: httpx.AsyncClient, engine: ScriptedEngine) -> None:
        session = (await begin(client)).json()
        body = {"session_id": session["id"], "instructions": "Be brief.", "input": "hello"}
        for _ in range(3):
            assert (await client.post("/v1/responses", json=body)).status_code == 200
        kept = (await client.get(f"/v1/sessions/{session['id']}")).json()["messages"]
        assert [one["role"] for one in kept] == ["system", *["user", "assistant"] * 3]

    run(talk)
