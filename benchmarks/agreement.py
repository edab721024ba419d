"""Checks that the engines of the comparison compute the same model: the logits of all on the same weights.

    python -m benchmarks.agreement --model kimi_linear|minimax --work DIRECTORY --llama-python PATH

`DIRECTORY` holds what `benchmarks.engines_cpu` wrote. With `--dump` (in llama.cpp's interpreter) it only writes
llama.cpp's logits to a file.
"""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.shapes import MODELS
from benchmarks.workload import PARTS, prompt

ROOT = Path(__file__).parent.parent
TOKENS = 600  # more than two blocks of 256 and one of 512, the sizes in which the engines work


def dump(file: Path, target: Path, exact: bool) -> None:
    """Write llama.cpp's logits [TOKENS, vocabulary]; `exact`: with an fp32 cache and without flash attention."""
    from benchmarks.engine_llama import Llama

    np.save(target, Llama(file, threads=2, room=PARTS["main"], exact=exact).all_logits(prompt(TOKENS, seed=0)))


def compare(name: str, logits: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> None:
    differences = np.abs(logits - expected).max(-1)  # of each token
    same = (logits.argmax(-1) == expected.argmax(-1)).mean()
    median = np.median(differences)
    print(f"{name}: difference at most {differences.max():.1e}, median {median:.1e}, same argmax {same:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description="compare the logits of the engines with those of transformers")
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--llama-python", type=Path)
    parser.add_argument("--dump", choices=("exact", "timed"))
    options = parser.parse_args()
    work = options.work.resolve() / options.model
    files = {kind: work / f"logits_{kind}.npy" for kind in ("exact", "timed")}
    if options.dump:
        dump(work / "float32.gguf", files[options.dump], options.dump == "exact")
        return
    from benchmarks.engine_statewise import Statewise
    from tests.checkpoints import reference_logits

    tokens = prompt(TOKENS, seed=0)
    expected = reference_logits(work / "float32", tokens).numpy()
    print(f"{TOKENS} tokens; logits from {expected.min():.1f} to {expected.max():.1f}")
    own = Statewise(work / "float32", "float32", threads=2, room=PARTS["main"])
    compare("statewise", own.llm.logits(tokens).numpy(), expected)
    if options.llama_python is None:
        return
    for kind, file in files.items():
        command = [options.llama_python, "-m", "benchmarks.agreement", "--dump", kind]
        command += ["--model", options.model, "--work", options.work]
        subprocess.run(command, cwd=ROOT, check=True)
        compare(f"llama.cpp, {kind}", np.load(file), expected)


if __name__ == "__main__":
    main()
