"""Turns the samples of `engines_cpu.py` into figures, a table and the comparison with the targets."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from benchmarks.shapes import BYTES, Model
from benchmarks.workload import MANY, MANY_TOKENS

Samples = dict[str, Any]  # one `workload.Result`
Figures = dict[str, Any]
MANY_LIMIT = 1.3  # times that MANY short prompts may take of one prompt of as many tokens


def summary(samples: Mapping[tuple[str, str, str], list[Samples]]) -> list[Figures]:
    """One entry per engine and dtype: medians over all rounds and repeats, and the best sample of each."""
    figures = []
    for engine, dtype in dict.fromkeys(key[:2] for key in samples):
        main, long, many = (samples.get((engine, dtype, part), []) for part in ("main", "long", "many"))
        first = (main + long + many)[0]
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
        if many:
            figure["many_s"], figure["one_s"] = (
                statistics.median(value for one in many for value in one[name]) for name in ("many_s", "one_s")
            )
            figure["many_to_one"] = figure["many_s"] / figure["one_s"]
        figures.append(figure)
    return figures


def table(model: Model, figures: list[Figures]) -> Table:
    result = Table(title=f"random {model.title}: median (best)")
    headings = ("engine", "dtype", "decode B=1 ms", "tok/s", "B=16 tok/s", "prefill 2,048 tok/s")
    short = f"{MANY} x {MANY_TOKENS} / 1 x {MANY * MANY_TOKENS:,} s"
    for heading in (*headings, "peak MiB", "load s", "512 -> 32k ms", short):
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
            row.append(f"{figure['short_context_ms']:.1f} -> {figure['long_context_ms']:.1f} ({figure['growth']:.1f}x)")
        else:
            row.append("-")
        if "many_s" in figure:
            row.append(f"{figure['many_s']:.2f} / {figure['one_s']:.2f} ({figure['many_to_one']:.2f}x)")
        result.add_row(*row)
    return result


def comparison(model: Model, figures: list[Figures], bandwidth: list[dict[str, Any]]) -> list[str]:
    """What the table means: the memory ceiling, the targets, and how far Statewise is ahead of each other engine."""
    lines = []
    if bandwidth:
        rates = {name: statistics.median(one[name]["best"] for one in bandwidth) for name in ("read", "copy", "update")}
        lines.append("memory bandwidth: " + ", ".join(f"{name} {rate:.1f} GB/s" for name, rate in rates.items()))
        for dtype in BYTES:
            moved = model.step_bytes(dtype)
            floor = moved / max(rates.values()) / 1e6
            lines.append(f"{dtype}: a decode step at batch 1 moves {moved / 1e6:.0f} MB: {floor:.2f} ms at best")
    names = ("decode B=1", "B=16", "prefill")
    for own in figures:
        if own["engine"] != "statewise":
            continue
        dtype = own["dtype"]
        if "decode_ms" in own:
            goals = model.absolute.get(dtype)
            if goals:
                speed = (goals[0] / own["decode_ms"], own["batch_tok_s"] / goals[1], own["prefill_tok_s"] / goals[2])
                lines.append(f"{dtype} targets: " + marks(names, [value >= 1 for value in speed]))
            for other in figures:
                if other["engine"] != "statewise" and other["dtype"] == dtype and "decode_ms" in other:
                    lines.append(f"{dtype} against {other['engine']}: " + ahead(model, own, other, names))
        if "many_to_one" in own:
            text = marks((f"{MANY} short prompts in {own['many_to_one']:.2f}x",), [own["many_to_one"] <= MANY_LIMIT])
            lines.append(f"{dtype}, at most {MANY_LIMIT}x the time of one long prompt: {text}")
    return lines


def marks(names: tuple[str, ...], reached: list[bool]) -> str:
    return ", ".join(f"{name} {'reached' if good else 'missed'}" for name, good in zip(names, reached, strict=True))


def ahead(model: Model, own: Figures, other: Figures, names: tuple[str, ...]) -> str:
    """How many times Statewise is as fast as another engine, and whether that is what was asked."""
    ratios = (
        other["decode_ms"] / own["decode_ms"],
        own["batch_tok_s"] / other["batch_tok_s"],
        own["prefill_tok_s"] / other["prefill_tok_s"],
    )
    goals = model.over_transformers if other["engine"] == "transformers" else (1, 1, 1)
    labels = tuple(f"{name} {ratio:.2f}x of {goal}x" for name, ratio, goal in zip(names, ratios, goals, strict=True))
    return marks(labels, [ratio >= goal for ratio, goal in zip(ratios, goals, strict=True)])


def same_answers(samples: Mapping[tuple[str, str, str], list[Samples]]) -> list[str]:
    """How far the greedy tokens of the first batched decode in fp32 agree, which every engine ran on one prompt set."""
    first = {key[0]: runs[0] for key, runs in samples.items() if key[1:] == ("float32", "main")}
    own = first.pop("statewise", None)
    if own is None:
        return []
    lines = []
    for other in first.values():
        pairs = list(zip(own["answers"], other["answers"], strict=True))
        alike = sum(mine == theirs for mine, theirs in pairs)
        lines.append(f"float32, B=16: {alike} of {len(pairs)} sequences have the tokens of {other['engine']}")
    return lines
