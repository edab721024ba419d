"""OpenAI's own client against the served demo model: chats, sessions, errors, and clients that leave."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.server.conftest import KEYS, QUEUED
from tests.server.served import Served

ADD: Any = [{"role": "user", "content": "What is 27 + 45?"}]
SUM = "27 + 45 = 72"
ENDLESS: Any = {"model": "demo", "prompt": "The", "max_tokens": 6000, "extra_body": {"ignore_eos": True}}


def new_async(client: OpenAI) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=client.base_url, api_key=client.api_key, max_retries=0, timeout=60)


def running(shared: Served) -> int:
    """Requests in the engine, waiting or running."""
    stats = shared.client.get("/v1/statewise/stats").json()
    return int(stats["running"] + stats["waiting"])


def test_the_model_is_listed(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object) == ("demo", "model")
    assert client.models.retrieve("demo") == model


def test_a_chat_whole_and_streamed(client: OpenAI) -> None:
    whole = client.chat.completions.create(model="demo", messages=ADD, temperature=0)
    (choice,) = whole.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", SUM, "stop")
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    options: Any = {"include_usage": True}
    stream = client.chat.completions.create(
        model="demo", messages=ADD, temperature=0, stream=True, stream_options=options
    )
    *chunks, last = stream
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in [*chunks, last]}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == SUM
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert (reasons[-1], set(reasons[:-1])) == ("stop", {None})
    assert (last.choices, {chunk.usage for chunk in chunks}) == ([], {None})
    assert last.usage is not None and last.usage.prompt_tokens_details is not None
    assert last.usage.prompt_tokens == last.usage.prompt_tokens_details.cached_tokens == whole.usage.prompt_tokens
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    plain = list(client.chat.completions.create(model="demo", messages=ADD, temperature=0, stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in plain)


def test_the_client_puts_a_stream_together(client: OpenAI) -> None:
    with client.chat.completions.stream(model="demo", messages=ADD, temperature=0) as stream:
        assert "".join(event.delta for event in stream if event.type == "content.delta") == SUM
        final = stream.get_final_completion()
    assert (final.choices[0].message.content, final.choices[0].finish_reason) == (SUM, "stop")


def test_an_asynchronous_client_asks_for_many_things_at_once(shared: Served, client: OpenAI) -> None:
    sums = [(a, b) for a in (12, 27) for b in (13, 45, 61)]

    def question(a: int, b: int) -> Any:
        return [{"role": "user", "content": f"What is {a} + {b}?"}]

    alone = [
        client.chat.completions.create(model="demo", messages=question(a, b), temperature=0).choices[0].message.content
        for a, b in sums
    ]

    async def whole(asker: AsyncOpenAI, a: int, b: int) -> str | None:
        answer = await asker.chat.completions.create(model="demo", messages=question(a, b), temperature=0)
        return answer.choices[0].message.content

    async def streamed(asker: AsyncOpenAI, a: int, b: int) -> str:
        stream = await asker.chat.completions.create(model="demo", messages=question(a, b), temperature=0, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_of_them() -> list[Any]:
        async with new_async(client) as asker:
            return await asyncio.gather(*(ask(asker, a, b) for ask in (whole, streamed) for a, b in sums))

    assert asyncio.run(all_of_them()) == alone * 2
    assert sum(text == f"{a} + {b} = {a + b}" for (a, b), text in zip(sums, alone, strict=True)) >= 4


def test_a_session_goes_on_where_it_was(client: OpenAI, shared: Served) -> None:
    fact = [
        {"role": "user", "content": "Remember this:\nThe code of the green lamp is 4821."},
        {"role": "assistant", "content": "Noted."},
    ]
    session = shared.client.post("/v1/sessions", json={"messages": fact}).json()["id"]
    extra = {"session_id": session}
    question: Any = [{"role": "user", "content": "What is the code of the green lamp?"}]
    answer = client.chat.completions.create(model="demo", messages=question, temperature=0, extra_body=extra)
    assert "4821" in (answer.choices[0].message.content or "")
    options: Any = {"include_usage": True}
    *_, last = client.chat.completions.create(
        model="demo", messages=ADD, temperature=0, stream=True, stream_options=options, extra_body=extra
    )
    assert last.usage is not None and last.usage.prompt_tokens_details is not None
    assert (last.usage.prompt_tokens_details.cached_tokens or 0) > last.usage.prompt_tokens // 2
    shown = shared.client.get(f"/v1/sessions/{session}").json()
    assert len(shown["turns"]) == 5
    with pytest.raises(openai.NotFoundError, match="session"):
        client.with_options(api_key=KEYS["bob"]).chat.completions.create(model="demo", messages=ADD, extra_body=extra)


def test_errors_are_those_that_the_client_knows(client: OpenAI, shared: Served) -> None:
    asked: Any = {"model": "demo", "messages": ADD}
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(**{**asked, "model": "other"})
    assert (missing.value.code, missing.value.param, missing.value.type) == (
        "model_not_found",
        "model",
        "not_found_error",
    )
    assert missing.value.request_id
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    with pytest.raises(openai.BadRequestError, match="temperature") as bad:
        client.chat.completions.create(**asked, temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="maximum context length") as long:
        client.completions.create(model="demo", prompt=[5] * 10_000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**asked, stream=True, top_p=7)
    for key in ("another", KEYS["alice"] + "x"):
        for stream in (False, True):
            with pytest.raises(openai.AuthenticationError):
                client.with_options(api_key=key).chat.completions.create(**asked, stream=stream)
    with pytest.raises(openai.NotFoundError) as nothing:
        client.embeddings.create(model="demo", input="a")
    assert nothing.value.code == "unknown_url"
    with pytest.raises(openai.APIConnectionError):
        client.with_options(base_url="http://127.0.0.1:9/v1").models.list()


def test_a_client_that_leaves_frees_its_request(client: OpenAI, shared: Served) -> None:
    stream = client.completions.create(**ENDLESS, stream=True)
    next(iter(stream))
    shared.until(lambda: running(shared) == 1)
    stream.close()
    shared.until(lambda: running(shared) == 0)
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.4).completions.create(**ENDLESS)
    shared.until(lambda: running(shared) == 0)

    async def cancelled() -> None:
        async with new_async(client) as asker:
            task = asyncio.create_task(asker.completions.create(**ENDLESS))
            await asyncio.to_thread(shared.until, lambda: running(shared) == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(cancelled())
    shared.until(lambda: running(shared) == 0)
    statuses = [line.split()[6] for line in shared.log if "access_log POST /v1/completions" in line][-2:]
    assert statuses == ["499", "499"]  # no failure of the server
    made = shared.client.get("/v1/statewise/stats").json()["generated_tokens"]
    time.sleep(1.2)  # the engine tells twice a second
    assert shared.client.get("/v1/statewise/stats").json()["generated_tokens"] == made < 6000


def test_a_busy_server_asks_for_patience_and_a_patient_client_is_served(client: OpenAI, shared: Served) -> None:
    stream = client.completions.create(**{**ENDLESS, "prompt": ["The"] * QUEUED}, stream=True)
    next(iter(stream))
    with pytest.raises(openai.InternalServerError) as busy:
        client.completions.create(model="demo", prompt="A", max_tokens=1)
    assert (busy.value.status_code, busy.value.code) == (503, "overloaded")
    assert float(busy.value.response.headers["Retry-After"]) >= 1
    stream.close()
    assert client.with_options(max_retries=8).completions.create(model="demo", prompt="A", max_tokens=1).choices
    shared.until(lambda: running(shared) == 0)
