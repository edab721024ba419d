"""How long Statewise takes to start, and how fast its demo model answers one user.

    python -m benchmarks.startup [--repeats 5]

Times are of whole processes, from before the process exists until the event; the first start, which may have to
compile kernels, is shown apart from the later ones.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
IMPORT = """
import sys, time
start = time.perf_counter()
import statewise
seconds = time.perf_counter() - start
print(seconds, 'torch' in sys.modules)
"""
HELP = "import sys; sys.argv = ['statewise', '--help']; from statewise.cli import main; main()"
DEMO = """
import json, time
from statewise import LLM, SamplingParams
llm = LLM("demo")
ready = time.time()
params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
llm.generate("The sea was", params)
first = time.time()
params = SamplingParams(temperature=0, max_tokens=257, ignore_eos=True)
rates = []
for _ in range(3):
    start = time.perf_counter()
    metrics = llm.generate("Once upon a time there was", params)[0].metrics
    rates.append((257 / (time.perf_counter() - start), 256 / metrics.decode_s))
print(json.dumps({"ready": ready, "first": first, "rates": rates}))
"""


def run(source: str) -> tuple[float, str]:
    """Seconds of a whole process, and what it printed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True, check=True)
    return time.perf_counter() - start, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description="start-up times and the speed of the demo model")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    imports = [run(IMPORT)[1].split() for _ in range(options.repeats)]
    helps = [run(HELP)[0] for _ in range(options.repeats)]
    starts = []
    for _ in range(options.repeats):
        begin = time.time()
        answer = json.loads(run(DEMO)[1])
        starts.append(
            {"ready_s": answer["ready"] - begin, "first_s": answer["first"] - begin, "rates": answer["rates"]}
        )
    later = starts[1:] or starts
    rates = [rate for start in later for rate in start["rates"]]
    figures = {
        "import_s": statistics.median(float(seconds) for seconds, _ in imports),
        "import_loads_torch": any(loaded == "True" for _, loaded in imports),
        "help_s": statistics.median(helps),
        "demo_ready_first_start_s": starts[0]["ready_s"],
        "demo_ready_s": statistics.median(start["ready_s"] for start in later),
        "demo_first_token_s": statistics.median(start["first_s"] for start in later),
        "demo_generate_tok_s": statistics.median(whole for whole, _ in rates),
        "demo_decode_tok_s": statistics.median(decode for _, decode in rates),
    }
    table = Table("what", "measured", "target")
    table.add_row("import statewise", f"{figures['import_s']:.3f} s", "< 0.2 s")
    table.add_row("... imports torch", "yes" if figures["import_loads_torch"] else "no", "no")
    table.add_row("statewise --help, whole process", f"{figures['help_s']:.2f} s", "< 0.3 s")
    table.add_row('LLM("demo") ready, this first start', f"{figures['demo_ready_first_start_s']:.2f} s", "")
    table.add_row('LLM("demo") ready, later starts', f"{figures['demo_ready_s']:.2f} s", "< 3 s")
    table.add_row("... and its first token there", f"{figures['demo_first_token_s']:.2f} s", "")
    table.add_row("generate, 257 tokens, one request", f"{figures['demo_generate_tok_s']:.0f} tok/s", ">= 150 tok/s")
    table.add_row("... its decode steps alone", f"{figures['demo_decode_tok_s']:.0f} tok/s", "")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
