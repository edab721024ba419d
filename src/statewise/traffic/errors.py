"""What keeps a measurement from being made at all. A request that fails within one is a `Failure` of its record."""

from __future__ import annotations

from statewise.errors import StatewiseError


class ServerError(StatewiseError):
    """The server cannot be measured: it does not answer, refuses the key or the model, or is no such server."""
