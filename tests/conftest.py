"""What every test shares: the same arithmetic and the same hypothesis examples on each run."""

from __future__ import annotations

import os

# Threads that wait give up the core: on a busy machine spinning makes every parallel region wait for the scheduler.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from hypothesis import HealthCheck, settings

# Before any thread pool starts: a decayed state full of denormals is slow, and flushing must be the same everywhere.
torch.set_flush_denormal(True)
torch.set_num_threads(2)

settings.register_profile(
    "statewise",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("statewise")
