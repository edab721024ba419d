"""What a server was told, resolved once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServerSettings:
    """Names and limits. Bytes, seconds and counts."""

    model_name: str
    max_queued: int = 512  # requests that may be in the engine, waiting or running; more are told to come back
    retry_after_s: int = 1
    max_choices: int = 128  # prompts times n
    render_seconds: float = 10.0  # for a chat template and its tokens
    max_sessions: int = 4096
    session_ttl_s: float = 86_400.0  # without use
    drain_seconds: float = 30.0  # for running requests at the end
    page: bool = True  # at /, for people
