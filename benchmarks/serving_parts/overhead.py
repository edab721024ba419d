"""What the server adds: the same requests over HTTP and in the engine alone, by turns in one run.

Both engines have the same settings. The one that does not run waits and takes no processor time.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from benchmarks.serving_parts.processes import Server, cpu_seconds
from benchmarks.serving_parts.streams import run_streams


def run(streams: int, tokens: int, rounds: int, dtype: str) -> dict[str, Any]:
    """Tokens a second of each side in every round, and their medians. Raises `RuntimeError` where the texts differ."""
    from statewise import LLM, SamplingParams

    llm = LLM("demo", dtype=dtype)
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    samples = []
    with Server("--dtype", dtype) as server:
        for number in range(-1, rounds):  # the first round warms up
            # New prompts each time: what one round leaves in the cache is no help to the next.
            prompts = [f"{number} {at}: The people of the" for at in range(streams)]
            bodies = [
                {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True} for prompt in prompts
            ]
            sides: dict[str, float] = {}
            texts: dict[str, list[str]] = {}
            for side in ("engine", "server") if number % 2 else ("server", "engine"):
                if side == "engine":
                    begin = time.perf_counter()
                    outputs = llm.generate(prompts, params)
                    sides[side] = time.perf_counter() - begin
                    texts[side] = [output.outputs[0].text for output in outputs]
                else:
                    busy = cpu_seconds(server.process.pid)
                    sides[side], answers = run_streams(server.port, bodies)
                    busy = cpu_seconds(server.process.pid) - busy
                    texts[side] = [answer.text for answer in answers]
                    if not all(answer.whole and answer.tokens == tokens for answer in answers):
                        raise RuntimeError(f"a stream did not end well: {answers[0]}")
            if dtype == "float32" and texts["engine"] != texts["server"]:
                raise RuntimeError("the server's texts are not the engine's")
            if number >= 0:
                rates = {side: streams * tokens / seconds for side, seconds in sides.items()}
                samples.append({**rates, "http_busy": busy / sides["server"]})
    ratios = [one["server"] / one["engine"] for one in samples]
    return {
        "streams": streams,
        "tokens": tokens,
        "dtype": dtype,
        "engine_tok_s": statistics.median(one["engine"] for one in samples),
        "server_tok_s": statistics.median(one["server"] for one in samples),
        "overhead": 1 - statistics.median(ratios),
        "overhead_range": [1 - max(ratios), 1 - min(ratios)],
        "http_busy": statistics.median(one["http_busy"] for one in samples),
        "samples": samples,
    }
