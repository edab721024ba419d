"""What remembering prompts costs when none of them ever comes back: throughput with the cache on against off.

    python -m benchmarks.cache_overhead [--rounds 3] [--json FILE]
    python -m benchmarks.cache_overhead --model kimi_linear|minimax --work DIRECTORY [--dtype float32]

All engines live in one process and take turns, forwards and backwards. Every run has random prompts of its own: the
same ones would route as many tokens to each expert, and find what the processor's library has prepared for such a
product. README.md beside this file says what the columns mean.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from benchmarks.conversations import draw
from benchmarks.engines_cpu import Runner
from benchmarks.shapes import MODELS

if TYPE_CHECKING:
    from statewise import LLM
    from statewise.memory.cache import CheckpointCache

PAGE_SIZE = 64
FILLING_RUNS = 20  # of a workload, at most, until checkpoints are evicted


@dataclass(frozen=True)
class Workload:
    """Requests that are there at once, with prompts that have nothing in common."""

    name: str
    requests: int
    prompt_tokens: int
    answer_tokens: int

    @property
    def tokens(self) -> int:
        return self.requests * (self.prompt_tokens + self.answer_tokens)

    @property
    def title(self) -> str:
        return f"{self.name}: {self.requests} x ({self.prompt_tokens:,} + {self.answer_tokens})"

    @property
    def pages(self) -> int:
        return self.requests * -(-(self.prompt_tokens + self.answer_tokens) // PAGE_SIZE)


WORKLOADS = {
    "prefill": Workload("prefill", 8, 2000, 1),
    "mixed": Workload("mixed", 64, 200, 64),
    "decode": Workload("decode", 16, 32, 256),
}


@dataclass
class Sample:
    """One workload, run once. The counts are those of this run."""

    round: int
    seconds: float
    evictions: int
    free_records: int  # when it began
    free_pages: int


@dataclass
class Contender:
    """An engine of the comparison and what it measured, by workload."""

    name: str
    llm: LLM
    samples: dict[str, list[Sample]] = field(default_factory=dict)

    @property
    def cache(self) -> CheckpointCache:
        return self.llm.engine.scheduler.cache

    def run(self, workload: Workload, seed: str) -> float:
        """Seconds until all requests have ended and nothing moves between the tiers. Raises `RuntimeError` if a
        prompt was found in the cache."""
        from statewise import SamplingParams

        vocabulary = self.llm.engine.vocab_size
        seed = f"{self.name} {workload.name} {seed}"
        prompts = [draw(f"{seed} {number}", workload.prompt_tokens, vocabulary) for number in range(workload.requests)]
        params = SamplingParams(temperature=0, max_tokens=workload.answer_tokens, ignore_eos=True)
        start = time.perf_counter()
        outputs = self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
        self.cache.settle(wait=True)
        seconds = time.perf_counter() - start
        for output in outputs:
            if output.error is not None or output.metrics.cached_tokens:
                raise RuntimeError(f"{output.metrics.cached_tokens} tokens were cached; error: {output.error}")
        return seconds

    def fill(self, workload: Workload) -> None:
        """Warm up, and leave no room in the pools for more checkpoints."""
        before = self.cache.device.evictions
        for number in range(FILLING_RUNS):
            self.run(workload, f"fill {number}")
            if not self.cache.enabled or self.cache.device.evictions > before:
                return
        raise RuntimeError(f"{FILLING_RUNS} runs of {workload.name} have not filled the pools")

    def measure(self, workload: Workload, number: int, empty: bool) -> None:
        if empty:
            self.cache.clear()
        device = self.cache.device
        before, free = device.evictions, (device.records.num_free, device.pages.num_free)
        seconds = self.run(workload, f"round {number}")
        sample = Sample(number, seconds, device.evictions - before, *free)
        self.samples.setdefault(workload.name, []).append(sample)


def contenders(model: str | Path, dtype: str, workloads: list[Workload]) -> list[Contender]:
    """The cache off, on in the device's pools alone, and on as it is by default."""
    from statewise import LLM

    running = max(workload.requests for workload in workloads)
    pages = max(workload.pages for workload in workloads)
    sizes: dict[str, Any] = {"num_records": running + running // 2, "num_pages": pages + pages // 2}
    settings: dict[str, dict[str, Any]] = {
        "off": {"prefix_cache": False, "host_cache": 0},
        "on, no host tier": {"host_cache": 0},
        "on": {},
    }
    return [
        Contender(name, LLM(model, dtype=dtype, page_size=PAGE_SIZE, max_running=running, **sizes, **chosen))
        for name, chosen in settings.items()
    ]


def summary(contender: Contender, off: Contender, workload: Workload) -> dict[str, Any]:
    """Medians over the rounds; the ratio is that of a round, so that a slow minute of the machine hits both sides."""
    samples, others = contender.samples[workload.name], off.samples[workload.name]
    ratios = [other.seconds / one.seconds for one, other in zip(samples, others, strict=True)]
    return {
        "workload": workload.name,
        "cache": contender.name,
        "tok_s": statistics.median(workload.tokens / one.seconds for one in samples),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "evictions": statistics.median(one.evictions for one in samples),
        "free_records": statistics.median(one.free_records for one in samples),
        "free_pages": statistics.median(one.free_pages for one in samples),
        "samples": [asdict(one) for one in samples],
    }


def table(figures: list[dict[str, Any]], title: str) -> Table:
    result = Table(title=title)
    result.add_column("workload: requests x (prompt + answer)")
    result.add_column("cache")
    for heading in ("tok/s", "of off", "rounds from", "to", "evicted", "free before"):
        result.add_column(heading, justify="right")
    for one in figures:
        row = [f"{one['tok_s']:,.0f}", f"{one['ratio']:.3f}", *(f"{end:.3f}" for end in one["ratio_range"])]
        row += [f"{one['evictions']:.0f}", f"{one['free_records']:.0f} + {one['free_pages']:.0f}"]
        result.add_row(WORKLOADS[one["workload"]].title, one["cache"], *row)
    return result


def checkpoint(options: argparse.Namespace, console: Console) -> tuple[str | Path, str]:
    """The model's directory and number format. The random models are written where the comparison of engines has
    them, unless they are there."""
    if options.model not in MODELS:
        return options.model, options.dtype
    dtype = "float32" if options.dtype == "auto" else options.dtype
    writer = argparse.Namespace(model=options.model, work=options.work.resolve(), engines=["statewise"], threads=1)
    Runner(writer, console).prepare()
    return options.work.resolve() / options.model / dtype, dtype


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="throughput with the prefix cache on and off, nothing to reuse")
    names = ", ".join(MODELS)
    parser.add_argument("--model", default="demo", help=f"demo, a checkpoint directory, or a random one: {names}")
    parser.add_argument("--work", type=Path, help="directory for the weights of a random model, kept between runs")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of torch and numba (default: one per core)")
    parser.add_argument("--empty", action="store_true", help="forget all before each run, instead of with full pools")
    parser.add_argument("--json", type=Path, help="write all samples to this file")
    options = parser.parse_args()
    if options.model in MODELS and options.work is None:
        parser.error("a random model needs --work")
    if options.rounds < 1:
        parser.error("rounds must be at least 1")
    return options


def main() -> None:
    options, console = parse(), Console()
    console = console if console.is_terminal else Console(width=150)  # a file or a pipe: room for the whole table
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    workloads = [WORKLOADS[name] for name in options.workloads]
    model, dtype = checkpoint(options, console)
    engines = contenders(model, dtype, workloads)
    config = engines[0].llm.engine.config
    for workload in workloads:
        for engine in engines:
            engine.fill(workload)
        for number in range(options.rounds):
            for engine in engines if number % 2 == 0 else reversed(engines):
                engine.measure(workload, number, options.empty)
        console.print(f"{workload.title}: {options.rounds} rounds done")
    pools = f"{config.num_records} records, {config.num_pages} pages, {'emptied' if options.empty else 'full'}"
    figures = [summary(engine, engines[0], workload) for workload in workloads for engine in engines]
    console.print(table(figures, f"{options.model}, {config.dtype}; {pools}"))
    if options.json:
        settings = {name: str(value) for name, value in vars(options).items()}
        pool_sizes = {"records": config.num_records, "pages": config.num_pages}
        options.json.write_text(json.dumps({"settings": settings, **pool_sizes, "figures": figures}, indent=2))


if __name__ == "__main__":
    main()
