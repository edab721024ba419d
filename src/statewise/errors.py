"""The errors that Statewise raises on purpose. Each message is one sentence that says what to change."""

from __future__ import annotations


class StatewiseError(Exception):
    """Base of all errors that a user can cause or should see."""


class CheckpointError(StatewiseError):
    """The model directory cannot be served: missing, malformed, truncated, or of an unknown architecture."""


class ConfigError(StatewiseError):
    """An engine option is out of range or not supported."""


class RequestError(StatewiseError):
    """A request is invalid. `field` names the offending input."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class PluginError(StatewiseError):
    """A layer registration is wrong: a name claimed twice, a missing method, a spec that is not kept."""


class BlockError(StatewiseError):
    """The block pool was used against its contract, or found inconsistent."""


class OutOfBlocks(StatewiseError):
    """A block pool has no free block left."""


class SnapshotError(StatewiseError):
    """A snapshot file cannot be written, or is refused: altered, truncated, too large, newer, of another model."""
