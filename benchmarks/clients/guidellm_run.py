"""guidellm against a served model: how fast it answers, and that no request fails or comes back short.

statewise serve demo                                                   # in another terminal
python -m benchmarks.clients.guidellm_run --guidellm VENV/bin/guidellm [--url URL] [--streams 4] [--requests 40]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from statewise.models.directory import model_directory

PROMPT_TOKENS, OUTPUT_TOKENS = 64, 32
FIGURES = {  # what guidellm calls them
    "time_to_first_token_ms": "first token, ms",
    "inter_token_latency_ms": "between tokens, ms",
    "request_latency": "whole answer, s",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--guidellm", default="guidellm", help="its executable, of an environment of its own")
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--requests", type=int, default=40)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.json"
        tokens = f"prompt_tokens={PROMPT_TOKENS},output_tokens={OUTPUT_TOKENS}"
        command = [options.guidellm, "run"]
        command += ["--backend", f"kind=openai_http,target={options.url},model=demo"]
        command += ["--profile", f"kind=concurrent,streams={options.streams}"]
        command += ["--tokenizer", f"kind=hf_auto,model={model_directory('demo')}"]
        command += ["--data", f"kind=synthetic_text,{tokens}"]
        command += ["--constraint", f"kind=max_requests,count={options.requests}"]
        command += ["--output", f"kind=json,path={report}"]
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment |= {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"guidellm failed: {(done.stdout + done.stderr)[-3000:]}")
        (benchmark,) = json.loads(report.read_text())["benchmarks"]
    metrics = benchmark["metrics"]
    table = Table("figure", "mean", "median", "99 %")
    for name, words in FIGURES.items():
        one = metrics[name]["successful"]
        table.add_row(words, *(f"{value:.2f}" for value in (one["mean"], one["median"], one["percentiles"]["p99"])))
    Console(width=110).print(table)
    totals = metrics["request_totals"]
    answered, made = totals["successful"], metrics["output_token_count"]["successful"]["mean"]
    rates = [metrics[name]["successful"]["mean"] for name in ("requests_per_second", "output_tokens_per_second")]
    print(f"{rates[0]:.1f} requests and {rates[1]:.0f} tokens a second")
    print(f"{answered} of {options.requests} requests answered, {made:.1f} tokens each, {OUTPUT_TOKENS} asked for")
    sys.exit(answered != options.requests or made != OUTPUT_TOKENS)


if __name__ == "__main__":
    main()
