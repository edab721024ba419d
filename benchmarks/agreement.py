"""Checks that the engines of the comparison compute the same model: transformers and llama.cpp on the same weights.

    python -m benchmarks.agreement --work DIRECTORY --llama-python PATH

`DIRECTORY` holds what `benchmarks.kimi_linear_cpu` wrote. With `--dump` (in llama.cpp's interpreter) it only writes
llama.cpp's logits to a file.
"""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

import numpy as np

from benchmarks.workload import prompt

ROOT = Path(__file__).parent.parent
TOKENS = 200


def dump(file: Path, target: Path, exact: bool) -> None:
    """Write llama.cpp's logits [TOKENS, vocabulary]; `exact`: with an fp32 cache and without flash attention."""
    from benchmarks.engine_llama import Llama

    np.save(target, Llama(file, threads=2, context_limit=1024, exact=exact).all_logits(prompt(TOKENS, seed=0)))


def main() -> None:
    parser = argparse.ArgumentParser(description="compare the logits of llama.cpp and transformers")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--llama-python", type=Path)
    parser.add_argument("--dump", choices=("exact", "timed"))
    options = parser.parse_args()
    work = options.work.resolve()
    files = {kind: work / f"logits_{kind}.npy" for kind in ("exact", "timed")}
    if options.dump:
        dump(work / "float32.gguf", files[options.dump], options.dump == "exact")
        return
    if options.llama_python is None:
        parser.error("name llama.cpp's interpreter with --llama-python")
    from tests.checkpoints import reference_logits

    expected = reference_logits(work / "float32", prompt(TOKENS, seed=0)).numpy()
    for kind, file in files.items():
        command = [options.llama_python, "-m", "benchmarks.agreement", "--work", work, "--dump", kind]
        subprocess.run(command, cwd=ROOT, check=True)
        logits = np.load(file)
        same = (logits.argmax(-1) == expected.argmax(-1)).mean()
        print(f"llama.cpp, {kind}: largest difference {np.abs(logits - expected).max():.1e}, same argmax {same:.0%}")


if __name__ == "__main__":
    main()
