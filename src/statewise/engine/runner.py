"""The model with its pools: turns scheduled work into logits."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numba
import torch
from torch import Tensor

from statewise.config import EngineConfig
from statewise.engine.probe import probe_layers
from statewise.engine.scheduler import Work
from statewise.errors import ConfigError
from statewise.layers.mixer import TokenMixer
from statewise.memory.blocks import BlockPool, BlockSpec
from statewise.memory.cache import CheckpointCache
from statewise.memory.disk import DiskTier
from statewise.memory.tiers import Tier
from statewise.ops.batch import Piece, build_batch

LOGITS_BLOCK = 256  # rows of hidden states turned into logits at a time
_DEVICE = (
    threading.Lock()
)  # engines of one process take turns: they share the cores, and numba may allow one caller only
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
FROZEN_RECORDS = 256  # at most so many are laid out for frozen points, beside those of running sequences
MEMORY_SHARE = 0.5  # of the available memory, for both pools together
HOST_SHARE = 0.25  # of the available memory, at most, for checkpoints that have left the pools


class Runner:
    """Owns the weights and the two pools. One call of `forward` is one step of the device."""

    def __init__(self, model: Any, config: EngineConfig) -> None:
        self.model = model
        keep_freed_memory()
        with _turn():
            probe_layers(model.mixers, config)
        record_spec, page_spec = block_specs(model.mixers, config)
        self.config = size_pools(config, record_spec, page_spec, model.config.max_length)
        self.records = BlockPool("record", record_spec, self.config.num_records, config.device)
        self.pages = BlockPool("page", page_spec, self.config.num_pages, config.device)
        self.states = [
            (self.records if mixer.scope == "record" else self.pages).state(index)
            for index, mixer in enumerate(model.mixers)
        ]

    def checkpoints(self) -> CheckpointCache:
        """A cache of checkpoints in the pools, in host memory and on the disk, as configured. Raises `ConfigError`."""
        config, record, page = self.config, self.records.spec, self.pages.spec
        host = disk = None
        if config.host_records:
            records = BlockPool("host record", record, config.host_records)
            host = Tier(records, BlockPool("host page", page, config.host_pages), keeps_wanted=True)
        if config.disk_cache is not None and config.prefix_cache:
            if host is None:
                raise ConfigError("disk_cache needs room in host memory: raise host_cache above 0")
            layout = repr((config.identity, config.dtype, config.page_size, record.described(), page.described()))
            belongs_to = blake2b(layout.encode(), digest_size=16).hexdigest()
            sizes = (host.records.block_bytes, host.pages.block_bytes)
            disk = DiskTier(
                config.disk_cache, config.disk_cache_bytes, belongs_to, *sizes, self.model.config.hidden_size
            )
        # On a CPU the host's memory is the pools' own: a copy there is worth nothing unless somebody asks for it.
        lowers = config.device.type != "cpu" or config.host_cache is not None or disk is not None
        device = Tier(self.records, self.pages)
        return CheckpointCache(device, host, disk, config.page_size, config.prefix_cache, lowers)

    @torch.inference_mode()
    def forward(self, work: SequenceOf[Work]) -> list[Tensor]:
        """Run the work. Returns the hidden rows [count, hidden] of each item, in the order of `work`."""
        # Decode rows come first in a batch; a one-token piece with a history is one of them.
        order = sorted(range(len(work)), key=lambda i: not (work[i].count == 1 and work[i].sequence.computed > 0))
        pieces = []
        for i in order:
            sequence, count = work[i].sequence, work[i].count
            assert sequence.record is not None
            tokens = sequence.tokens[sequence.computed : sequence.computed + count]
            pieces.append(Piece(tokens, sequence.computed, sequence.record, sequence.pages, work[i].freezes))
        batch = build_batch(pieces, self.config.page_size, self.config.device)
        with _turn():
            hidden = self.model(batch, self.states)
        rows = dict(zip(order, hidden.split([len(piece.tokens) for piece in pieces]), strict=True))
        return [rows[i] for i in range(len(work))]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[R, hidden] -> [R, vocab] fp32, in blocks of bounded size."""
        with _turn():
            if hidden.shape[0] <= LOGITS_BLOCK:
                return self.model.logits(hidden)
            return torch.cat([self.model.logits(block) for block in hidden.split(LOGITS_BLOCK)])


@contextmanager
def _turn() -> Iterator[None]:
    """The device for one caller: engines of one process take turns, with the settings that belong to a thread."""
    with _DEVICE:
        torch.set_flush_denormal(True)
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
        yield


def keep_freed_memory() -> None:
    """Let the C library reuse freed memory instead of giving it back: a step frees and takes tens of megabytes, and
    the page faults of mapping them again cost a tenth and more of a prefill. Only glibc has the switches."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
        mallopt(option, 1 << 30)


def block_specs(mixers: SequenceOf[TokenMixer], config: EngineConfig) -> tuple[BlockSpec, BlockSpec]:
    """The layout of a record and of a page on this rank, from what the layers declare."""
    rank, size = config.ranks.rank, config.ranks.size
    records, pages = {}, {}
    for index, mixer in enumerate(mixers):
        spec = mixer.state_spec().per_rank(rank, size)
        if mixer.scope == "record":
            records[index] = spec
        else:
            pages[index] = spec.per_page(config.page_size)
    return BlockSpec(records), BlockSpec(pages)


def size_pools(config: EngineConfig, record: BlockSpec, page: BlockSpec, model_length: int) -> EngineConfig:
    """Fill in the numbers of records and pages, and the longest sequence that both model and pages can hold.

    What is given is kept. Otherwise: a record for each running sequence and some for frozen points, as far as a quarter
    of the available memory allows, and pages for the rest of the share, at most what all records could use.
    """
    there = available_memory()
    for name, count, block in (("num_records", config.num_records, record), ("num_pages", config.num_pages, page)):
        if count * block.nbytes > there:
            raise ConfigError(
                f"{name} {count} needs {count * block.nbytes >> 20} MiB, {there >> 20} MiB are there: lower it"
            )
    available = there * MEMORY_SHARE
    wanted = config.max_running + (FROZEN_RECORDS if config.prefix_cache else 0)
    records = config.num_records or max(1, min(wanted, int(available / 2 // max(record.nbytes, 1))))
    per_sequence = -(-(config.max_length or model_length) // config.page_size)
    pages = config.num_pages
    if not page.nbytes:
        pages, per_sequence = 1, 0
    elif not pages:
        left = max(available - records * record.nbytes, available / 4)
        pages = max(1, min(int(left // page.nbytes), per_sequence * records))
    length = min(config.max_length or model_length, model_length)
    if page.nbytes:
        length = min(length, pages * config.page_size)
    if length < 2:
        raise ConfigError(f"a sequence of {length} tokens is too short to serve; raise max_length or num_pages")
    host_records, host_pages = _host_blocks(config, there, records, pages, record.nbytes, page.nbytes)
    return replace(
        config,
        num_records=records,
        num_pages=pages,
        max_length=length,
        host_records=host_records,
        host_pages=host_pages,
    )


def _host_blocks(
    config: EngineConfig, there: int, records: int, pages: int, record_bytes: int, page_bytes: int
) -> tuple[int, int]:
    """Records and pages in host memory, in the proportion of the device's pools."""
    whole = records * record_bytes + pages * page_bytes
    wanted = config.host_cache
    if wanted is not None and wanted > there:
        raise ConfigError(f"host_cache {wanted >> 20} MiB is more than the {there >> 20} MiB that are there: lower it")
    share = 1.0 if not whole else (wanted if wanted is not None else min(whole, there * HOST_SHARE)) / whole
    return (max(1, int(records * share)), max(1, int(pages * share))) if share else (0, 0)


def available_memory() -> int:
    """Bytes of memory that the system can give without swapping, within the limit of the control group."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        total = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        if limit != "max":
            total = min(total, int(limit) - used)
    except (OSError, ValueError, StopIteration):
        pass
    return max(total, 256 << 20)
