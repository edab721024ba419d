"""Work beside the event loop that ends when its time is up, even where it loops for ever."""

from __future__ import annotations

import asyncio
import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


class _TimeIsUp(BaseException):
    """Raised in the worker's thread. No `Exception`, so that no template's error handling catches it."""


class _Interruptible:
    """One piece of work, which another thread may stop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: int | None = None
        self._stopped = False

    def run(self, work: Callable[[], Result]) -> Result | None:
        """The result of `work`; None where it was stopped."""
        try:
            with self._lock:
                if self._stopped:
                    return None
                self._thread = threading.get_ident()
            try:
                return work()
            finally:
                with self._lock:
                    self._thread = None
        except _TimeIsUp:  # it may come anywhere up to here, but no later: it is only sent while `_thread` is set
            with self._lock:
                self._thread = None
            return None

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            if self._thread is not None:
                # The interpreter raises it at the next bytecode: a loop ends, a long call of a C function does not.
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), ctypes.py_object(_TimeIsUp))


class BoundedWork:
    """Runs functions in threads of its own."""

    def __init__(self, seconds: float, threads: int = 4) -> None:
        self._seconds = seconds
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="text")

    async def run(self, work: Callable[[], Result]) -> Result:
        """The result of `work`. Raises what it raises, and `TimeoutError` when it takes longer than it may."""
        piece = _Interruptible()
        future = asyncio.get_running_loop().run_in_executor(self._pool, lambda: (piece.run(work),))
        done, _ = await asyncio.wait([future], timeout=self._seconds)
        if not done:
            piece.stop()
            future.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
            raise TimeoutError
        return future.result()[0]  # type: ignore[return-value]

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
