"""`statewise chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from statewise.cli.display import bytes_text
from statewise.cli.loading import load
from statewise.cli.options import engine_arguments, engine_options, model_argument, sampling_arguments, sampling_options
from statewise.errors import RequestError, StatewiseError

if TYPE_CHECKING:
    from statewise import LLM, RequestOutput, SamplingParams
    from statewise.api.model_summary import ModelSummary

_HELP = """/reset  forget the conversation
/help   show this list
/exit   leave (Ctrl-D does too); Ctrl-C stops an answer"""


@click.command()
@model_argument
@click.option("--system", metavar="TEXT", help="The system message.")
@sampling_options
@engine_options
def chat(model: str, system: str | None, **options: Any) -> None:
    """Talk with a model. Answers stream; /reset forgets, /help lists the commands, /exit leaves.

    Each line is a message; standard input may be a pipe. After an answer its speed is shown, and the memory of the
    conversation: a state of constant size, and pages that grow.
    """
    from statewise import SamplingParams

    params = SamplingParams(**{"max_tokens": 1024, "temperature": 0.6, **sampling_arguments(options)})
    llm = load(model, **engine_arguments(options))
    if llm.tokenizer is None:
        raise RequestError("model", "this checkpoint has no tokenizer.json; use generate with --prompt-token-ids")
    Conversation(llm, params, system, interactive=sys.stdin.isatty()).run()


class Conversation:
    """The turns so far and the loop that adds to them."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None, interactive: bool) -> None:
        self._llm = llm
        self._params = params
        self._beginning = [] if system is None else [{"role": "system", "content": system}]
        self._messages = list(self._beginning)
        self._interactive = interactive
        self._summary: ModelSummary = llm.summary()

    def run(self) -> None:
        if self._interactive:
            _load_line_editing()
            click.secho(f"{self._summary.name}: /help lists the commands", dim=True, err=True)
        while (line := self._read()) is not None:
            message = line.strip()
            if message == "/exit":
                return
            if message == "/reset":
                self._messages = list(self._beginning)
                click.secho("The conversation is forgotten.", dim=True, err=True)
            elif message.startswith("/"):
                if message != "/help":
                    click.secho(f"There is no command {message.split()[0]}.", err=True)
                click.secho(_HELP, dim=True, err=True)
            elif message:
                self._turn(message)

    def _read(self) -> str | None:
        """The next line, None at the end of the input."""
        if not self._interactive:
            return sys.stdin.readline() or None
        try:
            return input("> ")
        except EOFError:
            click.echo()
            return None

    def _turn(self, message: str) -> None:
        self._messages.append({"role": "user", "content": message})
        try:
            answer, output = self._answer()
        except StatewiseError as error:
            if not self._interactive:
                raise
            self._messages.pop()
            click.echo(f"error: {error}", err=True)
            return
        self._messages.append({"role": "assistant", "content": answer})
        if output is not None:
            click.secho(self._status(output), dim=True, err=True)

    def _answer(self) -> tuple[str, RequestOutput | None]:
        """Stream an answer to the terminal. Without an output where Ctrl-C ended it."""
        pieces: list[str] = []
        output: RequestOutput | None = None
        deltas = self._llm.stream(self._messages, self._params)
        try:
            for delta in deltas:
                pieces.append(delta.text)
                click.echo(delta.text, nl=False)
                sys.stdout.flush()
                output = delta.output or output
        except KeyboardInterrupt:
            if not self._interactive:
                raise
            deltas.close()  # type: ignore[attr-defined]
        finally:
            if pieces:
                click.echo()
        if output is not None and output.error is not None:
            raise StatewiseError(output.error)
        return "".join(pieces), output

    def _status(self, output: RequestOutput) -> str:
        metrics = output.metrics
        tokens = metrics.prompt_tokens + metrics.completion_tokens
        pages = -(-tokens // self._summary.page_size) * self._summary.page_bytes
        decoded = metrics.completion_tokens - 1
        parts = [f"{metrics.completion_tokens} tokens"]
        if metrics.decode_s and decoded > 0:
            parts.append(f"{decoded / metrics.decode_s:.0f} tokens/s")
        parts.append(f"state {bytes_text(self._summary.record_bytes)}, constant")
        parts.append(f"pages {bytes_text(pages)} for {tokens} tokens, growing")
        return "  ".join(parts)


def _load_line_editing() -> None:
    with suppress(ImportError):
        import readline  # noqa: F401 - its presence gives input() history and editing
