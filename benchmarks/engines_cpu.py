"""A hybrid model of 110 M parameters on a CPU: Statewise, transformers and llama.cpp on the same weights, in one run.

    python -m benchmarks.engines_cpu --model kimi_linear|minimax --work DIRECTORY [--llama-python PATH] [--json FILE]

Every engine, number format and round is a process of its own; the rounds take turns, so that a slow minute of the
machine hits all engines alike. README.md beside this file says what each figure means.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.report import Samples, comparison, same_answers, summary, table
from benchmarks.shapes import BYTES, MODELS
from benchmarks.workload import PARTS

ROOT = Path(__file__).parent.parent
ENGINES = ("statewise", "transformers", "llama")
DTYPES = tuple(BYTES)
PROCESS_LIMIT_S = 1800
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # how threads wait for work: each engine as it does by itself
LLAMA_CHECK = "import llama_cpp, gguf, safetensors"


class Runner:
    """Starts the processes and keeps what they print."""

    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self.options, self.console = options, console
        self.model = MODELS[options.model]
        self.work: Path = options.work / options.model
        self.work.mkdir(parents=True, exist_ok=True)
        self.notes: list[str] = []
        self.samples: dict[tuple[str, str, str], list[Samples]] = defaultdict(list)  # by engine, dtype, part
        self.bandwidth: list[dict[str, Any]] = []
        self.engines = [engine for engine in options.engines if engine != "llama" or self.llama_is_there()]
        threads = str(options.threads)
        limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), threads)
        path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        inherited = {name: value for name, value in os.environ.items() if name not in WAITING}
        self.environment = inherited | limits | {"PYTHONPATH": path, "TRANSFORMERS_VERBOSITY": "error"}

    def llama_is_there(self) -> bool:
        python = self.options.llama_python
        if python is None:
            self.notes.append("llama.cpp skipped: name an interpreter that has it with --llama-python")
            return False
        if subprocess.run([python, "-c", LLAMA_CHECK], capture_output=True, check=False).returncode:
            self.notes.append("llama.cpp skipped: its interpreter lacks llama-cpp-python, gguf or safetensors")
            return False
        return True

    def python(self, engine: str) -> str:
        return str(self.options.llama_python) if engine == "llama" else sys.executable

    def module(self, python: str, name: str, *arguments: str) -> str | None:
        """Run a module of this folder; returns the last line it printed, or None (with a note) when it failed."""
        command = [python, "-m", f"benchmarks.{name}", *arguments]
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=self.environment,
                capture_output=True,
                text=True,
                timeout=PROCESS_LIMIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            self.notes.append(f"{name} took more than {PROCESS_LIMIT_S} s and was ended")
            return None
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
            self.notes.append(f"{name} failed: {reason[0]}")
            return None
        return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""

    def prepare(self) -> None:
        """Write the weights, once: a checkpoint in each number format and, for llama.cpp, a GGUF file of each."""
        import torch

        from tests.checkpoints import kimi_linear_config, minimax_config, write_checkpoint

        makers: dict[str, Callable[..., dict[str, Any]]]
        makers = {"kimi_linear": kimi_linear_config, "minimax": partial(minimax_config, "hf")}
        config = makers[self.options.model](**self.model.shape)
        for dtype in DTYPES:
            directory = self.work / dtype
            written = directory / "model.safetensors"
            if not written.exists() or json.loads((directory / "config.json").read_text()) != config | {"dtype": dtype}:
                self.console.print(f"writing the {dtype} checkpoint")
                write_checkpoint(directory, config, dtype=getattr(torch, dtype))
            file = self.work / f"{dtype}.gguf"
            stale = not file.exists() or file.stat().st_mtime < written.stat().st_mtime
            if "llama" in self.engines and stale:
                source = str(self.work / "float32")
                self.module(self.python("llama"), "gguf_writer", source, str(file), "--dtype", dtype)

    def run(self, engine: str, dtype: str, part: str, round_number: int) -> None:
        model = self.work / (f"{dtype}.gguf" if engine == "llama" else dtype)
        self.console.print(f"round {round_number + 1}: {engine}, {dtype}, {part}")
        arguments = ["--dtype", dtype, "--part", part, "--seed", str(round_number)]
        arguments += ["--threads", str(self.options.threads), "--repeats", str(self.options.repeats)]
        line = self.module(self.python(engine), f"engine_{engine}", str(model), *arguments)
        if line:
            self.samples[engine, dtype, part].append(json.loads(line))

    def run_all(self) -> None:
        for round_number in range(self.options.rounds):
            line = self.module(sys.executable, "bandwidth", "--threads", str(self.options.threads))
            if line:
                self.bandwidth.append(json.loads(line))
            for part in PARTS if round_number < self.options.other_rounds else ("main",):
                for dtype in self.options.dtypes:
                    for engine in self.engines:
                        self.run(engine, dtype, part, round_number)


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    features = [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{name}, {os.cpu_count()} cores, {' '.join(features)}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="compare engines on a random hybrid model of 110 M parameters")
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument(
        "--work", type=Path, required=True, help="directory for the weights (1.3 GB a model), kept between runs"
    )
    parser.add_argument("--llama-python", type=Path, help="interpreter with llama-cpp-python, gguf and safetensors")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--other-rounds", type=int, default=1, help="rounds that also run the long context and the many short prompts"
    )
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each figure in one process")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where the figures go (default: results.json beside the weights)")
    options = parser.parse_args()
    options.work = options.work.resolve()
    return options


def main() -> None:
    options, console = parse(), Console()
    console = console if console.is_terminal else Console(width=150)  # a file or a pipe: room for the whole table
    runner = Runner(options, console)
    runner.prepare()
    runner.run_all()
    figures = summary(runner.samples)
    console.print(f"{processor()}; {options.threads} threads")
    console.print(table(runner.model, figures))
    for line in comparison(runner.model, figures, runner.bandwidth) + same_answers(runner.samples) + runner.notes:
        console.print(line, highlight=False)
    answer = {
        "model": options.model,
        "processor": processor(),
        "threads": options.threads,
        "bandwidth_gb_s": runner.bandwidth,
        "figures": figures,
        "samples": [one for part in runner.samples.values() for one in part],
        "notes": runner.notes,
    }
    file = options.json or runner.work / "results.json"
    file.write_text(json.dumps(answer, indent=2))


if __name__ == "__main__":
    main()
