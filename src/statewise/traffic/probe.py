"""What is asked of a server before it is measured: which model it serves, and what its tokens are."""

from __future__ import annotations

from typing import Any

import msgspec

from statewise.traffic.connection import ConnectionGone
from statewise.traffic.errors import ServerError
from statewise.traffic.stream import explain
from statewise.traffic.target import Target
from statewise.traffic.workload import WORDS, Vocabulary


async def model_of(target: Target, wanted: str | None) -> str:
    """The model to measure: `wanted`, or the first that the server lists. Raises `ServerError` in one sentence."""
    status, body = await _ask(target, "GET", "/v1/models")
    if status in (401, 403):
        raise ServerError(
            f"{target.url} {'wants an API key' if target.api_key is None else 'refuses the API key'} "
            f"({status}): give one with --api-key-file or in STATEWISE_API_KEY"
        )
    if status == 404:
        raise ServerError(f"{target.url} has no /v1/models: give the URL of a server with OpenAI's API")
    if status != 200:
        raise ServerError(f"{target.url}/v1/models answers with status {status}: {explain(body)[1]}")
    try:
        listed = [str(one["id"]) for one in msgspec.json.decode(body)["data"]]
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise ServerError(f"{target.url}/v1/models is no list of models: is it a server with OpenAI's API?") from None
    if wanted is not None and wanted not in listed:
        raise ServerError(f"the server has no model {wanted!r}: it lists {', '.join(listed[:8]) or 'none'}")
    if not listed:
        raise ServerError(f"{target.url} lists no model: name one with --model")
    return wanted or listed[0]


async def vocabulary_of(target: Target, model: str, ids: bool) -> Vocabulary:
    """What random prompts of the asked length are made of: token ids where `ids` and the server tells some, or words.

    A server without /tokenize gets words, each taken for one token.
    """
    asked = {"model": model, "prompt": " ".join(WORDS), "add_special_tokens": False}
    try:
        status, body = await target.ask("POST", "/tokenize", asked)
        tokens: Any = msgspec.json.decode(body)["tokens"] if status == 200 else []
    except (OSError, ConnectionGone, msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError):
        tokens = []
    if not isinstance(tokens, list) or not tokens or not all(isinstance(one, int) for one in tokens):
        return Vocabulary()
    return Vocabulary(tuple(sorted(set(tokens))) if ids else None, len(tokens) / len(WORDS))


async def version_of(target: Target) -> str | None:
    """What the server says it is, if it does."""
    try:
        status, body = await target.ask("GET", "/version")
        return str(msgspec.json.decode(body)["version"])[:100] if status == 200 else None
    except (OSError, ConnectionGone, msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError):
        return None


async def _ask(target: Target, method: str, path: str) -> tuple[int, bytes]:
    try:
        return await target.ask(method, path)
    except ConnectionRefusedError:
        reason = "the connection is refused"
    except (OSError, ConnectionGone) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
    raise ServerError(f"nothing that can be measured answers at {target.url}: {reason}")
