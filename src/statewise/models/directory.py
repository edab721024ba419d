"""Where a model lies. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from statewise.errors import CheckpointError


def model_directory(model: str | Path) -> Path:
    """The directory that `model` names: a path, or `demo` for the embedded model. Raises `CheckpointError`."""
    if str(model) == "demo":
        return Path(__file__).resolve().parent.parent / "demo"
    if not isinstance(model, str | Path):
        raise CheckpointError(f"model must be a path or 'demo', found {type(model).__name__}")
    directory = Path(model)
    if not str(model) or not directory.is_dir():
        known = "give the directory of a checkpoint, or 'demo' for the embedded model"
        raise CheckpointError(f"model '{model}' is not a directory; {known}")
    return directory
