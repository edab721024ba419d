"""Many streams for a while, then many clients that leave: what comes back is right, and nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import uvloop

from benchmarks.serving_parts.processes import Server, resident_bytes
from benchmarks.serving_parts.streams import Answer, received, request, stream

TOPICS = ("people", "city", "river", "king", "house", "war", "church", "law", "year", "road")
LONG = " ".join(f"word {number}" for number in range(300))
CALM_S = 30.0
SAMPLES = 12  # of memory


def bodies(count: int) -> list[dict[str, Any]]:
    """Greedy requests of different lengths, some with a beginning in common."""
    return [
        {
            "prompt": f"{LONG[: 211 * (number % 4)]} {number // 10}. The {TOPICS[number % 10]} of the",
            "max_tokens": 20 + 7 * (number % 13),
            "temperature": 0,
            "ignore_eos": True,
        }
        for number in range(count)
    ]


def everywhere(work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work())


def left(server: Server) -> dict[str, Any]:
    """What is there when nobody asks any more. Raises `RuntimeError` where something runs or is held for nobody."""

    def calm() -> dict[str, Any] | None:
        stats: dict[str, Any] = server.client.get("/v1/statewise/stats").json()
        streams = "statewise:streams 0.0\n" in server.client.get("/metrics").text
        held = stats["records"]["used"] == stats["checkpoints"]["device"]
        return stats if streams and held and stats["running"] == stats["waiting"] == 0 else None

    return server.until(calm, CALM_S) or {}


def mebibytes(server: Server) -> dict[str, float]:
    return {
        "http_mib": resident_bytes(server.process.pid) / (1 << 20),
        "engine_mib": resident_bytes(server.engine) / (1 << 20),
    }


def load(streams: int, seconds: float, distinct: int = 60) -> dict[str, Any]:
    """So many streams at any time. Every text must be the one that its prompt has when it is alone."""
    asked, wrong, failed = bodies(distinct), Counter[str](), Counter[str]()
    memory: list[dict[str, float]] = []
    done = tokens = 0
    # Pools that fill: memory of theirs that is touched for the first time looks like growth.
    pools = ["--num-records", str(streams + streams // 4), "--num-pages", str(20 * streams), "--host-cache", "64MiB"]
    with Server("--dtype", "float32", "--max-running", str(streams), *pools) as server:

        async def solo() -> list[Answer]:
            return [await stream(server.port, body) for body in asked]

        alone = everywhere(solo)

        async def many() -> None:
            nonlocal done, tokens
            end, chosen = time.monotonic() + seconds, random.Random(0)

            async def worker() -> None:
                nonlocal done, tokens
                while time.monotonic() < end:
                    at = chosen.randrange(distinct)
                    answer = await stream(server.port, asked[at])
                    done, tokens = done + 1, tokens + answer.tokens
                    if answer.error is not None or not answer.whole:
                        failed[answer.error or "cut"] += 1
                    elif answer != alone[at]:
                        wrong[asked[at]["prompt"][-40:]] += 1

            async def watch() -> None:
                while time.monotonic() < end:
                    await asyncio.sleep(seconds / SAMPLES)
                    memory.append(mebibytes(server))

            await asyncio.gather(watch(), *(worker() for _ in range(streams)))

        everywhere(many)
        stats = left(server)
        memory.append(mebibytes(server))
        status = server.stop()
    return {
        "streams": streams,
        "seconds": seconds,
        "answers": done,
        "tok_s": tokens / seconds,
        "failed": dict(failed),
        "wrong": dict(wrong),
        "memory": memory,
        "records_used": stats["records"]["used"],
        "checkpoints": stats["checkpoints"],
        "exit_status": status,
    }


def cuts(clients: int, at_once: int = 60) -> dict[str, Any]:
    """Clients that leave while they wait, while their prompt is computed, while they are answered."""
    endless = {"temperature": 0, "max_tokens": 4000, "ignore_eos": True}
    kinds: dict[str, tuple[dict[str, Any], int]] = {
        "queue": ({**endless, "prompt": "The", "stream": True}, 0),
        "prefill": ({**endless, "prompt": LONG, "stream": True}, 0),
        "decode": ({**endless, "prompt": "The", "stream": True}, 3),
        "whole": ({**endless, "prompt": "The", "stream": False}, 0),
    }
    chosen, events = random.Random(0), Counter[str]()
    with Server("--dtype", "float32", "--max-running", "16", "--max-prefill-tokens", "256") as server:
        body = bodies(1)[0]
        expected = everywhere(lambda: stream(server.port, body))
        before = mebibytes(server)

        async def cut(number: int) -> None:
            kind = list(kinds)[number % len(kinds)]
            asked, count = kinds[kind]
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(request({**asked, "prompt": f"{number} {asked['prompt']}"}))
            got = b""
            while got.count(b"data: ") < count and (piece := await reader.read(65_536)):
                got += piece
            await asyncio.sleep(chosen.uniform(0, 0.4))
            events[kind] += 1
            if number % 2:  # a reset, not an orderly end
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()

        async def all_of_them() -> None:
            room = asyncio.Semaphore(at_once)

            async def one(number: int) -> None:
                async with room:
                    await cut(number)

            await asyncio.gather(*(one(number) for number in range(clients)))

        begin = time.monotonic()
        everywhere(all_of_them)
        seconds = time.monotonic() - begin
        stats = left(server)
        calm = time.monotonic() - begin - seconds
        again = everywhere(lambda: stream(server.port, body))
        log, after, status = server.log(), mebibytes(server), server.stop()
    return {
        "cut": dict(events),
        "seconds": seconds,
        "calm_after_s": calm,
        "right_afterwards": again == expected,
        "before": before,
        "after": after,
        "records_used": stats["records"]["used"],
        "checkpoints": stats["checkpoints"],
        "tracebacks": log.count("Traceback"),
        "exit_status": status,
    }


def short(requests: int, at_once: int = 32) -> dict[str, Any]:
    """Short answers of the fake engine, half of them streamed: what stays in the HTTP process of each request."""
    memory = []
    with Server(pace=0.0) as server:
        for _ in range(6):

            async def some() -> None:
                room = asyncio.Semaphore(at_once)

                async def one(number: int) -> None:
                    async with room:
                        body = {"prompt": [11, 12], "max_tokens": 8, "stream": number % 2 == 0}
                        raw = await received(server.port, request(body))
                        if b" 200 " not in raw[:20] or json.dumps("length").encode() not in raw:
                            raise RuntimeError(raw[-200:])

                await asyncio.gather(*(one(number) for number in range(requests // 6)))

            everywhere(some)
            memory.append(resident_bytes(server.process.pid) / (1 << 20))
    return {"requests": requests, "http_mib": memory}
