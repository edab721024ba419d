"""The command line: with a stand-in for the engine, then with the demo model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import statewise
from statewise.cli import main
from statewise.cli.chat import Conversation
from statewise.cli.display import bytes_text, count_text, ranges_text
from statewise.cli.inspect import sequences_that_fit
from statewise.errors import CheckpointError, RequestError

ROOT = Path(__file__).parent.parent


# A stand-in for LLM: it answers with the words of the prompt, in upper case


@dataclass
class FakeLogprob:
    token_id: int
    logprob: float
    top: dict[int, float]


@dataclass
class FakeCompletion:
    index: int
    text: str
    token_ids: list[int]
    finish_reason: str = "stop"
    stop_reason: Any = None
    logprobs: list[FakeLogprob] | None = None
    logits: None = None


@dataclass
class FakeMetrics:
    prompt_tokens: int = 4
    completion_tokens: int = 3
    cached_tokens: int = 1
    preemptions: int = 0
    queue_s: float = 0.25
    time_to_first_token_s: float = 0.5
    decode_s: float = 0.5
    total_s: float = 1.0


@dataclass
class FakeOutput:
    outputs: list[FakeCompletion]
    metrics: FakeMetrics = field(default_factory=FakeMetrics)
    error: str | None = None


@dataclass
class FakeDelta:
    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    output: FakeOutput | None = None


@dataclass
class FakeLayer:
    index: int
    kind: str
    registered_name: str = "layer"
    feed_forward: str = "dense"
    parameters: int = 1000
    state_bytes: int = 0
    page_bytes_per_token: int = 0
    kernels: str = "cpu"


@dataclass
class FakeSummary:
    name: str = "fake"
    path: str = "/nowhere"
    architecture: str = "Fake"
    dtype: str = "float32"
    parameters: int = 4000
    weight_bytes: int = 16000
    layers: list[FakeLayer] = field(
        default_factory=lambda: [FakeLayer(0, "kda", state_bytes=2048), FakeLayer(1, "mla", page_bytes_per_token=16)]
    )
    record_bytes: int = 2048
    page_bytes: int = 1024
    page_size: int = 64
    max_length: int = 4096
    num_records: int | None = None
    num_pages: int | None = None


class FakeLLM:
    made: list[FakeLLM]
    with_tokenizer = True
    error: str | None = None

    def __init__(self, model: str, **arguments: Any) -> None:
        if model == "missing":
            raise CheckpointError("model 'missing' is not a directory;\nsay demo")
        self.model, self.arguments, self.requests = model, arguments, []  # type: ignore[var-annotated]
        self.tokenizer = object() if self.with_tokenizer else None
        self.config = type("Config", (), {"vocab_size": 100})
        FakeLLM.made.append(self)

    def close(self) -> None:
        self.closed = True

    def generate(self, prompts: Any, params: Any) -> list[FakeOutput]:
        self.requests.append((prompts, params))
        many = prompts if isinstance(prompts, list) else [prompts]
        return [self._output(prompt, params) for prompt in many]

    def chat(self, messages: Any, params: Any) -> list[FakeOutput]:
        self.requests.append((messages, params))
        return [self._output(messages, params)]

    def stream(self, prompt: Any, params: Any) -> Iterator[FakeDelta]:
        self.requests.append((list(prompt) if isinstance(prompt, list) else prompt, params))
        output = self._output(prompt, params)
        completion = output.outputs[0]
        for token_id, word in zip(
            completion.token_ids, completion.text.split(" ") if self.tokenizer else ["", "", ""], strict=False
        ):
            yield FakeDelta(0, word + " " if self.tokenizer else "", [token_id])
        yield FakeDelta(0, "", [], "stop", output)

    def summary(self) -> FakeSummary:
        return FakeSummary()

    def _output(self, prompt: Any, params: Any) -> FakeOutput:
        if isinstance(prompt, list):
            prompt = prompt[-1]["content"]
        text = prompt.upper() if isinstance(prompt, str) else "FROM IDS ONLY"
        logprobs = [FakeLogprob(7, float("-inf"), {7: -0.5})] if params.logprobs is not None else None
        completions = [
            FakeCompletion(index, text if self.tokenizer else "", [7, 8, 9], logprobs=logprobs)
            for index in range(params.n)
        ]
        return FakeOutput(completions, error=self.error)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    FakeLLM.made = []
    monkeypatch.setitem(vars(statewise), "LLM", FakeLLM)  # beside the lazy export, which would load torch
    monkeypatch.setattr(FakeLLM, "with_tokenizer", True)
    monkeypatch.setattr(FakeLLM, "error", None)
    return FakeLLM


def run(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, list(arguments), input=stdin)


# generate


def test_generate_streams_text(fake: type[FakeLLM]) -> None:
    result = run("generate", "fake", "--prompt", "one two three")
    assert (result.exit_code, result.stdout) == (0, "ONE TWO THREE \n")
    assert fake.made[0].requests[0][0] == "one two three"


def test_options_reach_the_engine_and_the_sampler(fake: type[FakeLLM]) -> None:
    engine = "--dtype float32 --max-prefill-tokens 7 --max-running 3 --num-records 2 --num-pages 9 --max-length 99"
    sampling = (
        "--max-tokens 5 --min-tokens 1 --temperature 0.5 --top-p 0.9 --top-k 3 --min-p 0.1 --seed 4 --stop x --stop yz"
        " --stop-token-id 3 --ignore-eos --repetition-penalty 1.1 --presence-penalty 0.2 --frequency-penalty 0.3"
    )
    assert run("generate", "fake", "-p", "a", *engine.split(), *sampling.split()).exit_code == 0
    llm = fake.made[0]
    assert llm.arguments == {
        "dtype": "float32",
        "max_prefill_tokens": 7,
        "max_running": 3,
        "num_records": 2,
        "num_pages": 9,
        "max_length": 99,
    }
    assert llm.requests[0][1] == statewise.SamplingParams(
        max_tokens=5,
        min_tokens=1,
        temperature=0.5,
        top_p=0.9,
        top_k=3,
        min_p=0.1,
        seed=4,
        stop=("x", "yz"),
        stop_token_ids=(3,),
        ignore_eos=True,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
    )


def test_defaults_are_those_of_the_library(fake: type[FakeLLM]) -> None:
    assert run("generate", "fake", "-p", "a").exit_code == 0
    assert fake.made[0].arguments == {}
    assert fake.made[0].requests[0][1] == statewise.SamplingParams()


def test_generate_reads_standard_input_less_one_line_break(fake: type[FakeLLM]) -> None:
    assert run("generate", "fake", stdin="one\ntwo\n\n").exit_code == 0
    assert fake.made[0].requests[0][0] == "one\ntwo\n"


def test_generate_reads_a_file_less_one_line_break(fake: type[FakeLLM], tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("one\ntwo\n\n")
    assert run("generate", "fake", "--prompt-file", str(tmp_path / "prompt.txt")).exit_code == 0
    assert fake.made[0].requests[0][0] == "one\ntwo\n"


def test_generate_chat_builds_messages(fake: type[FakeLLM]) -> None:
    assert run("generate", "fake", "--chat", "--system", "brief", "-p", "hi", "--no-stream").stdout == "HI\n"
    assert fake.made[0].requests[0][0] == [
        {"role": "system", "content": "brief"},
        {"role": "user", "content": "hi"},
    ]


def test_generate_json(fake: type[FakeLLM]) -> None:
    result = run("generate", "fake", "-p", "one two", "--json")
    assert json.loads(result.stdout) == {
        "text": "ONE TWO",
        "token_ids": [7, 8, 9],
        "finish_reason": "stop",
        "stop_reason": None,
        "usage": {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7, "cached_tokens": 1},
        "timings": {
            "queue_s": 0.25,
            "time_to_first_token_s": 0.5,
            "decode_s": 0.5,
            "tokens_per_second": 4.0,
            "total_s": 1.0,
        },
    }


def test_several_continuations(fake: type[FakeLLM]) -> None:
    answer = json.loads(run("generate", "fake", "-p", "a", "--json", "--n", "3", "--logprobs", "1").stdout)
    assert [choice["text"] for choice in answer["choices"]] == ["A"] * 3
    # minus infinity is not JSON
    assert answer["choices"][0]["logprobs"] == [{"token_id": 7, "logprob": None, "top": {"7": -0.5}}]
    assert "text" not in answer
    assert run("generate", "fake", "-p", "a", "-n", "2").stdout == "[0]\nA\n[1]\nA\n"


def test_a_checkpoint_without_tokenizer_speaks_ids(fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake, "with_tokenizer", False)
    for option in ("--stream", "--no-stream"):
        result = run("generate", "fake", "--prompt-token-ids", "1, 2,3", option)
        assert (result.exit_code, result.stdout) == (0, "7 8 9\n")
    assert fake.made[0].requests[0][0] == {"prompt_token_ids": [1, 2, 3]}
    result = run("chat", "fake", stdin="hi\n")
    assert result.exit_code == 2
    assert "no tokenizer.json" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "a", "--prompt-token-ids", "1"], "one of --prompt"),
        (["-p", "a", "--system", "b"], "--system needs --chat"),
        (["--prompt-token-ids", "1", "--chat"], "--chat needs"),
        (["--prompt-token-ids", "1,x"], "not a list of integers"),
        (["--prompt-token-ids", ","], "not a list of integers"),
        (["-p", "a", "--json", "--stream"], "--stream"),
        (["-p", "a", "--n", "2", "--stream"], "--stream"),
        (["-p", "a", "--logprobs", "2"], "--json"),
        (["-p", "a", "--dtype", "int3"], "int3"),
        (["-p", "a", "--max-tokens", "many"], "many"),
        (["-p", "a", "--unknown"], "--unknown"),
    ],
)
def test_wrong_usage_ends_with_two(fake: type[FakeLLM], arguments: list[str], message: str) -> None:
    result = run("generate", "fake", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not fake.made


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "missing", "-p", "a"], "error: model 'missing' is not a directory; say demo\n"),
        (["generate", "fake", "-p", "a", "--temperature", "-1"], "error: temperature must be"),
        (["generate", "fake", "-p", "a", "--top-p", "2"], "error: top_p must be"),
        (["generate", "fake", "-p", "a", "--n", "0"], "error: n must be"),
    ],
)
def test_an_error_is_one_line_and_two(fake: type[FakeLLM], arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_a_failed_request_is_an_error(fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake, "error", "the request failed")
    for option in ("--json", "--stream", "--no-stream"):
        result = run("generate", "fake", "-p", "a", option)
        assert (result.exit_code, result.stderr) == (2, "error: the request failed\n")


def test_ctrl_c_ends_with_130(fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(fake, "generate", interrupted)
    assert run("generate", "fake", "-p", "a", "--json").exit_code == 130


# chat


def test_chat_keeps_and_resets_the_conversation(fake: type[FakeLLM]) -> None:
    result = run("chat", "fake", "--system", "brief", stdin="one two\n\nthree\n/reset\nfour\n/what now\n/exit\nfive\n")
    assert result.exit_code == 0
    assert result.stdout == "ONE TWO \nTHREE \nFOUR \n"
    contents = [[message["content"] for message in messages] for messages, _ in fake.made[0].requests]
    assert contents == [
        ["brief", "one two"],
        ["brief", "one two", "ONE TWO ", "three"],
        ["brief", "four"],
    ]
    assert "no command /what" in result.stderr


def test_chat_tells_speed_and_memory(fake: type[FakeLLM]) -> None:
    result = run("chat", "fake", stdin="hi\n")
    assert result.exit_code == 0
    assert "3 tokens  4 tokens/s  state 2.0 KiB, constant  pages 1.0 KiB for 7 tokens, growing" in result.stderr


def test_chat_from_a_pipe_ends_at_an_error(fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise RequestError("prompt", "the prompt is too long")

    monkeypatch.setattr(fake, "stream", refuse)
    result = run("chat", "fake", stdin="hi\nagain\n")
    assert (result.exit_code, result.stderr) == (2, "error: the prompt is too long\n")


def test_ctrl_c_ends_the_answer_and_not_the_chat(
    fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    closed: list[bool] = []

    def interrupted(*_: Any) -> Iterator[FakeDelta]:
        try:
            yield FakeDelta(0, "half an", [7])
            raise KeyboardInterrupt
        finally:
            closed.append(True)

    lines = iter(["hi", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    llm = fake("fake")
    llm.stream = interrupted  # type: ignore[method-assign]
    conversation = Conversation(llm, statewise.SamplingParams(), None, interactive=True)  # type: ignore[arg-type]
    conversation.run()
    assert closed == [True]
    assert capsys.readouterr().out == "half an\n"


# inspect, eval, bench


def test_sequences_that_fit() -> None:
    rows = sequences_that_fit(FakeSummary(), 16000 + 10 * (2048 + 64 * 1024))  # type: ignore[arg-type]
    assert [row["tokens"] for row in rows] == [1024, 4096]
    assert rows[-1] == {"tokens": 4096, "sequence_bytes": 2048 + 64 * 1024, "sequences": 10}
    assert sequences_that_fit(FakeSummary(), 100)[0]["sequences"] == 0  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "amount"), [("1024", 1024), ("16GiB", 16 << 30), ("0.5 MB", 500_000), ("2k", 2000), ("3MiB", 3 << 20)]
)
def test_memory_sizes(text: str, amount: int) -> None:
    from statewise.cli.options import memory_size

    assert memory_size(text) == amount


def test_amounts_read_well() -> None:
    assert [bytes_text(n) for n in (0, 1023, 1536, 5 << 30, 3 << 40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 GiB",
        "3.0 TiB",
    ]
    assert [count_text(n) for n in (12, 1234, 5_600_000, 48 * 10**9)] == ["12", "1,234", "5.6 M", "48.0 B"]
    assert ranges_text([6, 0, 1, 2, 4, 5, 9]) == "0-2, 4-6, 9"


def test_eval_refuses_unknown_skills(fake: type[FakeLLM]) -> None:
    for names in ("add,juggle", ","):
        result = run("eval", "fake", "--skills", names)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: skills: unknown")
        assert "the known ones are add" in result.stderr


def test_eval_prints_the_report(fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch) -> None:
    from statewise.evaluation import score

    asked: list[Any] = []
    report = score.Report(0.75, [score.SkillScore("add", 0, 2, 1.0), score.SkillScore("add", 512, 2, 0.5)])

    def evaluate(llm: Any, instances: int, **arguments: Any) -> score.Report:
        asked.append((instances, arguments))
        return report

    monkeypatch.setattr(score, "evaluate", evaluate)
    assert run("eval", "fake", "--json", "--n", "2", "--seed", "3", "--skills", "add").stdout == report.to_json() + "\n"
    assert asked == [(2, {"skills": ["add"], "seed": 3, "progress": None})]
    table = run("eval", "fake").stdout
    assert "75.0%" in table
    assert "512" in table


def test_bench_measures_what_it_was_asked(fake: type[FakeLLM]) -> None:
    result = run("bench", "fake", "--batch", "1,3", "--prompt-tokens", "32", "--decode-tokens", "4", "--json")
    answer = json.loads(result.stdout)
    assert [row["batch"] for row in answer["decode"]] == [1, 3]
    assert answer["prefill"] == {"prompt_tokens": 32, "tokens_per_second": 16.0}
    assert answer["peak_memory_bytes"] > 1 << 20
    assert run("bench", "fake", "--batch", "0").exit_code == 2
    assert "tokens/s" in run("bench", "fake", "--repeat", "1").stdout


# With the demo model


def statewise_process(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    code = "import sys; sys.argv[0] = 'statewise'; from statewise.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        text=True,
        cwd=ROOT / "src",
        timeout=300,
        check=False,
    )


def test_demo_generates_json() -> None:
    done = statewise_process(
        "generate", "demo", "--chat", "-p", "What is 27 + 45?", "--temperature", "0", "--max-tokens", "16", "--json"
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert "72" in answer["text"]
    assert answer["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == len(answer["token_ids"])


def test_an_error_of_the_process_is_one_line_and_two() -> None:
    done = statewise_process("generate", "no/such/model", "-p", "a")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_demo_streams_the_same_text_as_it_returns() -> None:
    arguments = ["generate", "demo", "--prompt", "The people of the", "--max-tokens", "24", "--seed", "3"]
    streamed, whole = run(*arguments), run(*arguments, "--no-stream")
    assert streamed.exit_code == 0, streamed.stderr
    assert streamed.stdout == whole.stdout
    assert len(streamed.stdout) > 20


def test_demo_chats_from_a_pipe() -> None:
    done = run("chat", "demo", "--temperature", "0", stdin="What is 2 + 3?\n/exit\n")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.strip()
    assert "constant" in done.stderr
    assert "growing" in done.stderr


def test_demo_is_inspected() -> None:
    answer = json.loads(run("inspect", "demo", "--json", "--memory", "1GiB").stdout)
    assert answer["parameters"] > 10**6
    assert answer["memory_bytes"] == 1 << 30
    assert answer["record_bytes"] == sum(layer["state_bytes"] for layer in answer["layers"])
    result = run("inspect", "demo")
    assert result.exit_code == 0
    assert "kimi_gated_delta_net_attention" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "no/such/model", "-p", "a"], "no/such/model"),
        (["generate", "demo", "--prompt-token-ids", "1,99999999"], "99999999"),
        (["generate", "demo", "--prompt", ""], "prompt"),
        (["generate", "demo", "-p", "a", "--num-records", "0"], "num_records"),
        (["inspect", "no/such/model"], "no/such/model"),
    ],
)
def test_bad_input_is_one_line_without_traceback(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
