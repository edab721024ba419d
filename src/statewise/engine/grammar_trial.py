"""A process in which structures are tried out, because a few of them overflow the compiler's stack or never end.

    python -m statewise.engine.grammar_trial

It reads the vocabulary, then one structure after the other, as lines of JSON, and answers each with a line: what is
wrong with it, or an empty string. Every structure gets a fork of the process, which may hang or die.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import asdict

from statewise.engine.grammar import NAMES, Compiler
from statewise.engine.structure import Structure
from statewise.errors import RequestError

TRIAL_S = 0.75  # of processor time for one structure
WAIT_S = 5.0  # for the same on a machine that is busy
STEPS = 16  # tokens of a trial, with their masks
STACK_BYTES = 4 << 20  # less than the engine has: what fits here fits there
MEMORY_BYTES = 4 << 30
ANSWER_BYTES = 4096


class GrammarTrial:
    """Starts such a process and asks it. Safe between threads, one at a time."""

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_ids: list[int]) -> None:
        self._vocabulary = json.dumps([tokenizer_json, vocab_size, eos_ids])
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = self._start()

    def run(self, structure: Structure) -> None:
        """Raises `RequestError` for a structure that does not compile, overflows the stack, or takes too long."""
        with self._lock:
            line = self._ask(structure) or self._ask(structure)  # it may have been ended from outside
        if not line:
            raise RequestError("structure", "structures cannot be tried out: the process for it does not start")
        if problem := json.loads(line):
            raise RequestError(structure.field, problem)

    def close(self) -> None:
        with self._lock:
            self._end()

    def _ask(self, structure: Structure) -> bytes:
        process = self._process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(OSError):
            process.stdin.write(json.dumps(asdict(structure)).encode() + b"\n")
            process.stdin.flush()
            if line := process.stdout.readline():
                return line
        self._end()
        return b""

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "statewise.engine.grammar_trial"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        assert process.stdin is not None
        with suppress(OSError):  # whoever asks it first will see
            process.stdin.write(self._vocabulary.encode() + b"\n")
            process.stdin.flush()
        return process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with suppress(OSError):
                process.communicate()  # closes the pipes, too


def trial(compiler: Compiler, structure: Structure) -> str:
    """What is wrong with a structure: it is compiled, and a few tokens are taken as they come."""
    try:
        matcher = compiler.compile(structure)
    except RequestError as error:
        return str(error)
    control = compiler.control(structure)
    for step in range(STEPS):
        allowed = int.from_bytes(matcher.compute_bitmask(), "little") & ~control
        if matcher.is_error() or not allowed:
            return f"the {NAMES[structure.kind]} cannot be followed: it is too complex, or nothing matches it"
        if matcher.is_stopped():
            break
        lowest, highest = allowed & -allowed, 1 << (allowed.bit_length() - 1)
        matcher.consume_token((highest if step % 2 else lowest).bit_length() - 1)
    return ""


def tried(compiler: Compiler, structure: Structure) -> str:
    """The same in a fork, which does not outlive its time."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.setitimer(signal.ITIMER_PROF, TRIAL_S)  # its signal ends the fork
            worker = threading.Thread(target=_in_fork, args=(compiler, structure, writer))
            worker.start()
            worker.join()
        finally:
            os._exit(0)
    os.close(writer)
    ready, _, _ = select.select([reader], [], [], WAIT_S)
    problem = os.read(reader, ANSWER_BYTES).decode() if ready else ""
    os.close(reader)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if problem:
        return str(json.loads(problem))
    return f"the {NAMES[structure.kind]} takes too long to compile, or is nested too deeply; make it simpler"


def _in_fork(compiler: Compiler, structure: Structure, writer: int) -> None:
    os.write(writer, json.dumps(trial(compiler, structure)).encode())


def main() -> None:
    """Answer lines until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it decides when it ends
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK_BYTES)
    compiler = Compiler(*json.loads(sys.stdin.readline()))
    for line in sys.stdin:
        sys.stdout.write(json.dumps(tried(compiler, Structure(**json.loads(line)))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
