"""Turns the samples of `kimi_linear_cpu.py` into figures, a table and the comparison with the targets."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from benchmarks.workload import SHAPE

Samples = dict[str, Any]  # one `workload.Result`
Figures = dict[str, Any]

# Statewise's targets by dtype: ms per step and tokens/s at batch 1 and 16, tokens/s of the prefill
TARGETS = {
    "float32": {"decode_ms": 9.0, "batch_tok_s": 800.0, "prefill_tok_s": 1500.0},
    "bfloat16": {"decode_ms": 6.0, "batch_tok_s": 1000.0, "prefill_tok_s": 4000.0},
}
BYTES = {"float32": 4, "bfloat16": 2}


def step_bytes(dtype: str) -> int:
    """Bytes that a decode step at batch 1 must move: the weights in use once, the recurrent state in and out."""
    hidden, linear = SHAPE["hidden_size"], SHAPE["linear_attn_config"]
    heads, width, layers = linear["num_heads"], linear["head_dim"], SHAPE["num_hidden_layers"]
    kda = 4 * heads * width * hidden + 2 * width * (hidden + heads * width) + heads * hidden
    nope, rope, value = SHAPE["qk_nope_head_dim"], SHAPE["qk_rope_head_dim"], SHAPE["v_head_dim"]
    latent, queries = SHAPE["kv_lora_rank"], SHAPE["num_attention_heads"]
    mla = hidden * (queries * (nope + rope + value) + latent + rope) + latent * queries * (nope + value)
    expert = 3 * hidden * SHAPE["moe_intermediate_size"]
    moe = (SHAPE["num_experts_per_token"] + 1) * expert + SHAPE["num_experts"] * hidden
    weights = len(linear["kda_layers"]) * kda + len(linear["full_attn_layers"]) * mla + (layers - 1) * moe
    weights += 3 * hidden * SHAPE["intermediate_size"] + SHAPE["vocab_size"] * hidden
    state = len(linear["kda_layers"]) * heads * width * width * 4
    return int(weights * BYTES[dtype] + 2 * state)


def summary(samples: Mapping[tuple[str, str, str], list[Samples]]) -> list[Figures]:
    """One entry per engine and dtype: medians over all rounds and repeats, and the best sample of each."""
    figures = []
    for engine, dtype in dict.fromkeys(key[:2] for key in samples):
        main, long = samples.get((engine, dtype, "main"), []), samples.get((engine, dtype, "long"), [])
        first = (main + long)[0]
        figure: Figures = {"engine": first["engine"], "dtype": dtype, "version": first["version"]}
        if main:
            decode = [1e3 * value for one in main for value in one["decode_s"]]
            figure |= {"decode_ms": statistics.median(decode), "decode_ms_best": min(decode)}
            for name in ("batch_tok_s", "prefill_tok_s"):
                values = [value for one in main for value in one[name]]
                figure |= {name: statistics.median(values), f"{name}_best": max(values)}
            figure["peak_mib"] = max(one["peak_bytes"] for one in main) / (1 << 20)
            figure["load_s"] = statistics.median(one["load_s"] for one in main)
            figure["import_s"] = statistics.median(one["import_s"] for one in main)
        if long:
            short_ms = 1e3 * statistics.median(value for one in long for value in one["decode_s"])
            long_ms = 1e3 * statistics.median(value for one in long for value in one["long_decode_s"])
            figure |= {"short_context_ms": short_ms, "long_context_ms": long_ms, "growth": long_ms / short_ms}
        figures.append(figure)
    return figures


def table(figures: list[Figures]) -> Table:
    result = Table(title="random 110 M Kimi-Linear: median (best)")
    headings = ("engine", "dtype", "decode B=1 ms", "tok/s", "B=16 tok/s", "prefill 2,048 tok/s")
    for heading in (*headings, "peak MiB", "load s", "512 -> 32k ms", "growth"):
        result.add_column(heading, justify="left" if heading in ("engine", "dtype") else "right")
    for figure in sorted(figures, key=lambda one: (one["dtype"] != "float32", one["engine"] != "statewise")):
        row = [figure["engine"], figure["dtype"]]
        if "decode_ms" in figure:
            row.append(f"{figure['decode_ms']:.2f} ({figure['decode_ms_best']:.2f})")
            row.append(f"{1e3 / figure['decode_ms']:.0f}")
            row += [f"{figure[name]:.0f} ({figure[f'{name}_best']:.0f})" for name in ("batch_tok_s", "prefill_tok_s")]
            row += [f"{figure['peak_mib']:.0f}", f"{figure['load_s']:.2f}"]
        else:
            row += ["-"] * 6
        if "growth" in figure:
            row.append(f"{figure['short_context_ms']:.1f} -> {figure['long_context_ms']:.1f}")
            row.append(f"{figure['growth']:.2f}x")
        result.add_row(*row)
    return result


def comparison(figures: list[Figures], bandwidth: list[dict[str, Any]]) -> list[str]:
    """What the table means: the memory ceiling, the targets, and how far Statewise is ahead of each other engine."""
    lines = []
    if bandwidth:
        rates = {name: statistics.median(one[name]["best"] for one in bandwidth) for name in ("read", "copy", "update")}
        lines.append("memory bandwidth: " + ", ".join(f"{name} {rate:.1f} GB/s" for name, rate in rates.items()))
        for dtype in BYTES:
            floor = step_bytes(dtype) / max(rates.values()) / 1e6
            lines.append(
                f"{dtype}: a decode step at batch 1 moves {step_bytes(dtype) / 1e6:.0f} MB: {floor:.2f} ms at best"
            )
    by_key = {(one["engine"], one["dtype"]): one for one in figures if "decode_ms" in one}
    for (engine, dtype), own in by_key.items():
        if engine != "statewise":
            continue
        goals = TARGETS[dtype]
        reached = [own["decode_ms"] <= goals["decode_ms"], own["batch_tok_s"] >= goals["batch_tok_s"]]
        reached.append(own["prefill_tok_s"] >= goals["prefill_tok_s"])
        marks = ", ".join(
            f"{name} {'reached' if good else 'missed'}"
            for name, good in zip(("decode B=1", "B=16", "prefill"), reached, strict=True)
        )
        lines.append(f"{dtype} targets: {marks}")
        for (other, same), theirs in by_key.items():
            if other != "statewise" and same == dtype:
                ratios = (
                    theirs["decode_ms"] / own["decode_ms"],
                    own["batch_tok_s"] / theirs["batch_tok_s"],
                    own["prefill_tok_s"] / theirs["prefill_tok_s"],
                )
                text = "decode B=1 {:.1f}x, B=16 {:.1f}x, prefill {:.1f}x".format(*ratios)
                lines.append(f"{dtype} against {other}: {text}")
    return lines
