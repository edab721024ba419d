"""Loading safetensors checkpoints straight into their place, one component at a time."""

from __future__ import annotations

import ctypes
import json
import mmap
import sys
from collections.abc import Callable, Iterator, Set
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from statewise.errors import CheckpointError, PluginError, StatewiseError
from statewise.layers.contract import named
from statewise.layers.mixer import TokenMixer
from statewise.layers.parameters import Component, Slot
from statewise.layers.pluggable import described
from statewise.models.config import read_json

FLOATS = ("F32", "BF16", "F16")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
Progress = Callable[[int, int], None]
"""Called with the bytes loaded so far and the bytes in all."""


class Checkpoint:
    """The tensors of a directory by name, over one or several memory-mapped files."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.files: dict[str, Any] = {}
        self._paths: list[Path] = []
        for path, names in _files(directory):
            self._paths.append(path)
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
                present = set(file.keys())
            except (SafetensorError, OSError, ValueError) as error:
                raise CheckpointError(f"{path.name} is not a complete safetensors file: {error}") from None
            absent = sorted((names or set()) - present)
            if absent:
                raise CheckpointError(f"{path.name} lacks {_listing(absent)}, which the index places there")
            for name in present:
                if name in self.files:
                    raise CheckpointError(f"tensor '{name}' is stored in two files")
                self.files[name] = file

    @property
    def names(self) -> set[str]:
        return set(self.files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        return str(self.files[name].get_slice(name).get_dtype())

    def places(self) -> Iterator[tuple[Path, dict[str, tuple[int, int]]]]:
        """Each file, and where in it the bytes of its tensors begin and end. Raises `CheckpointError`."""
        for path in self._paths:
            try:
                with path.open("rb") as file:
                    length = int.from_bytes(file.read(8), "little")
                    table = json.loads(file.read(length))
                base = 8 + length
                offsets = {name: row["data_offsets"] for name, row in table.items() if name != "__metadata__"}
                places = {name: (base + begin, base + end) for name, (begin, end) in offsets.items()}
                if not places.keys() <= self.files.keys():
                    raise ValueError(path)
            except (OSError, ValueError, KeyError, TypeError, AttributeError):  # it was sound when it was opened
                raise CheckpointError(f"{path.name} changed while it was read; try again") from None
            yield path, places

    def copy_into(self, slot: Slot) -> None:
        """Copy a tensor into its place and let go of the file's pages that were read for it."""
        name = _find(slot, self)
        source = self.files[name].get_tensor(name)
        slot.fill(source)
        _forget_pages(source)


def load_weights(model: nn.Module, directory: Path, device: torch.device, progress: Progress | None = None) -> None:
    """Fill `model` (built on the meta device) from the safetensors files of `directory`.

    All names and shapes are checked before a byte is read. Raises `CheckpointError` that names missing, unexpected
    and misshapen tensors.
    """
    components = [module for module in model.modules() if isinstance(module, Component)]
    with ExitStack() as stack:
        checkpoint = Checkpoint(directory, stack)
        total = _check(model, components, checkpoint)
        done = 0
        for component in components:
            component.materialize(device)
            for slot in _slots(component, checkpoint.names):
                checkpoint.copy_into(slot)
                done += slot.target.nbytes
                if progress is not None:
                    progress(done, total)
            with _blaming(component, "finalize()"):
                component.finalize()


def check_slots(model: nn.Module) -> None:
    """Raise `PluginError` unless every parameter that a component declares has a place in a checkpoint."""
    for component in model.modules():
        if isinstance(component, Component):
            _slots(component, frozenset())


def _slots(component: Component, names: Set[str]) -> list[Slot]:
    with _blaming(component, "slots()"):
        slots = list(component.slots(names))
        if not all(isinstance(slot, Slot) for slot in slots):
            raise TypeError("it must yield Slots")
    unfilled = component.unfilled(slots)
    if unfilled:
        raise PluginError(f"{_named(component)}: no slot fills its parameter '{unfilled[0]}'; yield one from slots()")
    return slots


@contextmanager
def _blaming(component: Component, method: str) -> Iterator[None]:
    """What a component raises becomes a sentence that names it. Ours do not fail here, a plug-in may."""
    try:
        yield
    except StatewiseError:
        raise
    except Exception as error:
        raise PluginError(f"{_named(component)}: {method} failed with {type(error).__name__}: {error}") from error


def _named(component: Component) -> str:
    return named(component) if isinstance(component, TokenMixer) else described(type(component))


def _check(model: nn.Module, components: list[Component], checkpoint: Checkpoint) -> int:
    """Compare what the model expects with what the files hold. Returns the bytes that will be loaded."""
    names = checkpoint.names
    used: set[str] = set()
    missing: list[str] = []
    wrong: list[str] = []
    total = 0
    for component in components:
        for slot in _slots(component, names):
            total += slot.target.nbytes
            try:
                name = _find(slot, checkpoint)
            except CheckpointError:
                missing.append(slot.names[0])
                continue
            used.add(name)
            if _squeeze(checkpoint.shape(name)) != _squeeze(slot.shape):
                wrong.append(f"{name} is {list(checkpoint.shape(name))}, expected {list(slot.shape)}")
            elif checkpoint.dtype(name) not in FLOATS:
                wrong.append(
                    f"{name} is stored as {checkpoint.dtype(name)}, supported are {', '.join(FLOATS)}; convert it"
                )
    unexpected = sorted(name for name in names - used if not _skipped(name, model))
    for problem, found in (("tensors are missing", missing), ("tensors do not fit the configuration", wrong)):
        if found:
            raise CheckpointError(f"{len(found)} {problem}: {_listing(found)}")
    if unexpected:
        raise CheckpointError(f"{len(unexpected)} tensors are not part of the architecture: {_listing(unexpected)}")
    return total


def _find(slot: Slot, checkpoint: Checkpoint) -> str:
    for name in slot.names:
        if name in checkpoint.files:
            return name
    raise CheckpointError(f"tensor '{slot.names[0]}' is missing")


def _skipped(name: str, model: Any) -> bool:
    """Whether a tensor may be left unread: draft layers behind the last one, stored tables."""
    parts = name.split(".")
    if "layers" in parts[:-1]:
        index = parts[parts.index("layers") + 1]
        if index.isdigit() and int(index) >= model.config.num_layers:
            return True
    if name == "lm_head.weight" and model.config.tie_embeddings:
        return True
    return any(f".{skip}" in f".{name}" for skip in model.skipped_tensors)


def _files(directory: Path) -> list[tuple[Path, set[str] | None]]:
    """The files of a checkpoint, each with the names that the index places in it (None without an index)."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        placed = read_json(index).get("weight_map")
        if not isinstance(placed, dict) or not all(isinstance(v, str) for v in placed.values()):
            raise CheckpointError(f"{index.name}: 'weight_map' must map tensor names to file names")
        files: dict[str, set[str]] = {}
        for name, file in placed.items():
            files.setdefault(file, set()).add(name)
        for file in files:
            if Path(file).name != file or not (directory / file).is_file():
                raise CheckpointError(f"{index.name} names the file '{file}', which is not in the model directory")
        return [(directory / file, names) for file, names in sorted(files.items())]
    found = sorted(directory.glob("*.safetensors"))
    if len(found) == 1:
        return [(found[0], None)]
    if found:
        raise CheckpointError(f"{len(found)} safetensors files but no {index.name} that says what is in which")
    if any(path.suffix in PICKLES for path in directory.iterdir()):
        raise CheckpointError("the checkpoint is a pickle (.bin, .pt), which can run code; convert it to safetensors")
    raise CheckpointError("the model directory has no safetensors file")


def _squeeze(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def _listing(names: list[str], most: int = 4) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _forget_pages(tensor: Tensor) -> None:
    """Tell the kernel that the mapped file pages of `tensor` are not needed, so that they do not count as memory."""
    if not sys.platform.startswith("linux"):
        return
    page = mmap.PAGESIZE
    begin = -(-tensor.data_ptr() // page) * page
    end = (tensor.data_ptr() + tensor.nbytes) // page * page
    if end > begin:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)
