"""Statewise serves linear-attention and hybrid language models.

Importing it is cheap: torch is loaded when `LLM` is first used.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# Read by OpenMP when torch is loaded. Threads that wait for work spin for about half a millisecond, then sleep. The
# library's own default spins so long that on a busy machine every parallel region waits for the scheduler (measured: a
# decode step 27 times slower beside a busy test run), and sleeping at once costs half the speed of a quiet one.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

if TYPE_CHECKING:
    from statewise.api.llm import LLM as LLM
    from statewise.api.session import Session as Session
    from statewise.engine.request import Completion as Completion
    from statewise.engine.request import Delta as Delta
    from statewise.engine.request import RequestOutput as RequestOutput
    from statewise.engine.sampling_params import SamplingParams as SamplingParams
    from statewise.engine.structure import Structure as Structure
    from statewise.errors import StatewiseError as StatewiseError

__version__ = "0.1.0"

_EXPORTS = {
    "LLM": "statewise.api.llm",
    "Completion": "statewise.engine.request",
    "Delta": "statewise.engine.request",
    "RequestOutput": "statewise.engine.request",
    "SamplingParams": "statewise.engine.sampling_params",
    "Session": "statewise.api.session",
    "StatewiseError": "statewise.errors",
    "Structure": "statewise.engine.structure",
}
__all__ = [
    "LLM",
    "Completion",
    "Delta",
    "RequestOutput",
    "SamplingParams",
    "Session",
    "StatewiseError",
    "Structure",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'statewise' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_EXPORTS[name]), name)
