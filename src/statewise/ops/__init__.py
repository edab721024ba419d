"""The mathematics: one package per operator, each with its specification in `naive.py`.

Importing it settles two things for the process, before any thread pool starts. Denormal numbers count as zero: a
decayed state full of them is ten to fifty times slower. Numba's kernels run on OpenMP where there is one, in the
same thread pool as torch's, so that the two do not compete for the cores.
"""

from __future__ import annotations

import numba
import torch

torch.set_flush_denormal(True)
numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]
