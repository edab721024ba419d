"""Several tensor-parallel ranks inside one process: threads that take turns and meet in their sums."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from statewise.config import Ranks

Result = TypeVar("Result")
PATIENCE = 120.0  # seconds that a rank waits for the others in a sum


class RanksError(Exception):
    """The ranks did not call the same sums; the message says how they differ."""


class Group:
    """Runs one function per rank. Only one rank runs at a time: kernels need not allow concurrent callers.

    The lock of `_turn` is the right to run. A rank gives it away only while it waits in a sum.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.members = [Member(self, rank) for rank in range(size)]
        self._turn = threading.Condition(threading.Lock())
        self._parts: list[Tensor | None] = [None] * size
        self._total = torch.empty(0)
        self._round = 0
        self._problem = ""
        self._finished: list[int] = []

    def run(self, work: Callable[[Member], Result]) -> list[Result]:
        """`work(member)` of every rank, in rank order. Raises the first error; no rank is left waiting."""
        results: dict[int, Result] = {}
        errors: list[BaseException] = []
        self._parts, self._problem, self._finished = [None] * self.size, "", []
        threads_of_torch = torch.get_num_threads()

        def go(member: Member) -> None:
            with self._turn:
                # Settings that belong to a thread.
                torch.set_flush_denormal(True)
                torch.set_num_threads(threads_of_torch)
                try:
                    with torch.inference_mode():
                        results[member.rank] = work(member)
                    waiting = [rank for rank, part in enumerate(self._parts) if part is not None]
                    if waiting:
                        self._break(f"rank {waiting[0]} waits in all_reduce, but rank {member.rank} has returned")
                except BaseException as error:
                    errors.append(error)
                    self._break(f"rank {member.rank} failed")
                finally:
                    self._finished.append(member.rank)

        threads = [threading.Thread(target=go, args=(member,), daemon=True) for member in self.members]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # What broke the group comes before what others felt of it.
        for error in sorted(errors, key=lambda error: isinstance(error, RanksError)):
            raise error
        return [results[rank] for rank in range(self.size)]

    def sum(self, rank: int, x: Tensor) -> Tensor:
        """The sum of the parts of all ranks, added in rank order in at least float32."""
        if self._finished and not self._problem:
            self._break(f"rank {rank} calls all_reduce, but rank {self._finished[0]} has returned")
        self._refuse()
        self._parts[rank] = x.clone()
        parts = [part for part in self._parts if part is not None]
        if len(parts) == self.size:
            shapes = {(tuple(part.shape), part.dtype) for part in parts}
            if len(shapes) > 1:
                self._break(f"the ranks sum tensors that differ: {', '.join(sorted(map(str, shapes)))}")
                self._refuse()
            wide = torch.promote_types(x.dtype, torch.float32)
            self._total = torch.stack(parts).to(wide).sum(dim=0).to(x.dtype)
            self._parts = [None] * self.size
            self._round += 1
            self._turn.notify_all()
            return self._total.clone()
        current = self._round
        while self._round == current:
            self._refuse()
            if not self._turn.wait(PATIENCE):
                self._break(f"rank {rank} waited {PATIENCE:.0f} s in all_reduce for the others")
        return self._total.clone()

    def _break(self, problem: str) -> None:
        self._problem = self._problem or problem
        self._turn.notify_all()

    def _refuse(self) -> None:
        if self._problem:
            raise RanksError(self._problem)


class Member(Ranks):
    """One rank of a group."""

    def __init__(self, group: Group, rank: int) -> None:
        self._group = group
        self.rank = rank
        self.size = group.size

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._group.sum(self.rank, x)
