"""lm-eval against a served model, and the same questions asked of the engine in this process.

    statewise serve demo --dtype float32                                   # in another terminal
    python -m benchmarks.clients.lm_eval_run --lm-eval VENV/bin/lm_eval [--url URL] [--keep DIRECTORY]

Three runs: a chat tokenized by the client and sent as ids, plain text tokenized by the server, and a chat. Every
log-likelihood that lm-eval got over HTTP is computed once more offline; the script ends with status 1 where one is
further away than `TOLERANCE`, or an answer is another one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.clients import questions
from statewise import LLM, SamplingParams
from statewise.models.directory import model_directory

TOLERANCE = 1e-4  # nats, of a sum over all tokens of a continuation
LOOK = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)


@dataclass(frozen=True)
class Run:
    """One call of lm-eval."""

    name: str
    model: str
    path: str
    arguments: str
    tasks: tuple[str, ...]
    chat: bool = True


def runs(tokenizer: Path) -> list[Run]:
    local = f"tokenizer_backend=huggingface,tokenizer={tokenizer},tokenized_requests=True"
    remote = "tokenizer_backend=remote,tokenized_requests=True"
    both, plain = ("statewise_sums", "statewise_answers"), ("statewise_prose", "statewise_sums")
    return [
        Run("ids of the client", "local-completions", "/v1/completions", local, both),
        # lm-eval cannot apply a chat template with a remote tokenizer, so these are plain texts.
        Run("ids of the server", "local-completions", "/v1/completions", remote, plain, chat=False),
        Run("chat", "local-chat-completions", "/v1/chat/completions", "max_length=8192", ("statewise_answers",)),
    ]


def call(run: Run, url: str, lm_eval: str, directory: Path) -> dict[str, list[dict[str, Any]]]:
    """The samples of each task. Raises `CalledProcessError`."""
    output = directory / run.name.replace(" ", "-")
    arguments = f"model=demo,base_url={url}{run.path},num_concurrent=4,max_retries=1,max_length=8192,{run.arguments}"
    command = [lm_eval, "run", "--model", run.model, "--model_args", arguments]
    command += ["--tasks", ",".join(run.tasks), "--include_path", str(directory), "--batch_size", "1"]
    command += ["--output_path", str(output), "--log_samples", *(["--apply_chat_template"] if run.chat else [])]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(directory / "cache")}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | offline
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"lm-eval failed: {done.stderr[-3000:]}")
    return {
        task: [json.loads(line) for file in output.rglob(f"samples_{task}_*.jsonl") for line in file.open()]
        for task in run.tasks
    }


def likelihoods(llm: LLM, pairs: Sequence[tuple[list[int], list[int]]]) -> list[float]:
    """The log-likelihood of each continuation behind its context, as the engine computes it here."""
    outputs = llm.generate([{"prompt_token_ids": context + rest} for context, rest in pairs], LOOK)
    return [
        sum(entry.logprob for entry in (output.prompt_logprobs or [])[len(context) :] if entry is not None)
        for output, (context, _) in zip(outputs, pairs, strict=True)
    ]


def asked(sample: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The arguments of a sample's requests, in order."""
    yield from (sample["arguments"][key] for key in sorted(sample["arguments"]))


def told(sample: dict[str, Any]) -> list[Any]:
    """What lm-eval made of the server's answers."""
    return [answer[0] for answer in sample["resps"]]


def compare(llm: LLM, task: str, samples: Sequence[dict[str, Any]]) -> tuple[str, float, float, float]:
    """The metric's name, its value over HTTP and offline, and the largest difference of a log-likelihood."""
    assert llm.tokenizer is not None
    encode = llm.tokenizer.encode
    if task == "statewise_answers":
        talks = [[{"role": "user", "content": sample["doc"]["question"]}] for sample in samples]
        outputs = llm.chat(talks, SamplingParams(temperature=0, max_tokens=192, stop=["\n"]))
        texts = [output.outputs[0].text for output in outputs]
        heard = [told(sample)[0] for sample in samples]
        right = [text == sample["doc"]["answer"] for text, sample in zip(texts, samples, strict=True)]
        differing = sum(one != other for one, other in zip(heard, texts, strict=True))
        return "exact_match", _mean([sample["exact_match"] for sample in samples]), _mean(right), float(differing)
    if task == "statewise_prose":
        begin = llm.tokenizer.bos_id
        assert begin is not None
        pairs = [([begin], encode(sample["doc"]["text"], add_special_tokens=False)) for sample in samples]
        ours = likelihoods(llm, pairs)
        theirs = [float(told(sample)[0]) for sample in samples]
        return "log-likelihood", _mean(theirs), _mean(ours), _distance(ours, theirs)
    texts = [(one["arg_0"], one["arg_1"]) for sample in samples for one in asked(sample)]
    contexts = [encode(context, add_special_tokens=False) for context, _ in texts]
    wholes = [encode(context + rest, add_special_tokens=False) for context, rest in texts]
    ours = likelihoods(llm, [(head, whole[len(head) :]) for head, whole in zip(contexts, wholes, strict=True)])
    theirs = [float(answer[0]) for sample in samples for answer in told(sample)]
    best, at = [], 0
    for sample in samples:
        count = len(sample["doc"]["choices"])
        best.append(max(range(count), key=lambda index: ours[at + index]) == sample["doc"]["label"])
        at += count
    return "acc", _mean([sample["acc"] for sample in samples]), _mean(best), _distance(ours, theirs)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _distance(some: Sequence[float], others: Sequence[float]) -> float:
    return max(abs(one - other) for one, other in zip(some, others, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--lm-eval", default="lm_eval", help="its executable, of an environment of its own")
    parser.add_argument("--keep", type=Path, help="leave its files in this directory")
    options = parser.parse_args()
    llm = LLM("demo", dtype="float32")
    table = Table("run", "task", "questions", "metric", "over HTTP", "offline", "largest difference")
    good = True
    with tempfile.TemporaryDirectory() as temporary:
        directory = (options.keep or Path(temporary)).resolve()
        directory.mkdir(parents=True, exist_ok=True)
        questions.write(directory)
        for run in runs(model_directory("demo")):
            for task, samples in call(run, options.url, options.lm_eval, directory).items():
                metric, http, offline, distance = compare(llm, task, samples)
                good &= bool(samples) and distance <= TOLERANCE
                figures = (f"{http:.4f}", f"{offline:.4f}", f"{distance:.2g}")
                table.add_row(run.name, task, str(len(samples)), metric, *figures)
    Console(width=110).print(table)
    sys.exit(not good)


if __name__ == "__main__":
    main()
