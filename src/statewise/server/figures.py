"""Numbers for whoever looks on: `/v1/statewise/info`, what the model's memory costs; `/v1/statewise/stats`, what is
there now."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from statewise import __version__
from statewise.server.errors import ApiError
from statewise.server.replies import json_response
from statewise.server.service import LOADING_S, Service


def router(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1/statewise")
    engine, settings = service.engine, service.settings

    @routes.get("/info")
    async def info() -> Response:
        """What a sequence takes, in bytes: its record once, and a page for every `page_size` tokens.

        `kv_bytes_per_token_if_all_softmax` is what a token would take if every layer kept the keys and values of all
        its heads in the model's dtype; `own_attention` if every linear layer were one of the model's softmax layers.
        503 while the model is loaded.
        """
        loaded = engine.info
        if loaded is None:
            raise ApiError.overloaded(LOADING_S) if engine.phase == "loading" else ApiError.engine_dead()
        softmax, summary = loaded.softmax, loaded.summary
        layers = [
            {"index": layer["index"], "kind": layer["kind"], "scope": "record" if layer["state_bytes"] else "page"}
            for layer in summary["layers"]
        ]
        return json_response(
            {
                "object": "statewise.info",
                "version": __version__,
                "model": settings.model_name,
                "architecture": summary["architecture"],
                "dtype": summary["dtype"],
                "max_model_len": loaded.max_length,
                "layers": layers,
                "record_bytes": loaded.record_bytes,
                "page_bytes": loaded.page_bytes,
                "page_size": loaded.page_size,
                "num_records": loaded.num_records,
                "num_pages": loaded.num_pages,
                "kv_bytes_per_token_if_all_softmax": softmax.kv_bytes,
                "own_attention": {"bytes_per_token": softmax.own_bytes, "description": softmax.own_description},
            }
        )

    @routes.get("/stats")
    async def stats() -> Response:
        """What the engine does. It tells twice a second; `at` is when, in seconds of a clock that only goes on."""
        now, loaded = engine.stats, engine.info
        shown: dict[str, Any] = {"object": "statewise.stats", "phase": engine.phase}
        if now is not None and loaded is not None:
            shown |= {
                "at": now.at,
                "running": now.running,
                "waiting": now.waiting,
                "records": {"used": now.records_used, "total": loaded.num_records},
                "pages": {"used": now.pages_used, "total": loaded.num_pages},
                "checkpoints": now.checkpoints,
                "disk_bytes": now.disk_bytes,
                "prompt_tokens": now.prompt_tokens,
                "cached_tokens": now.cached_tokens,
                "generated_tokens": now.generated_tokens,
                "preemptions": now.preemptions,
            }
        return json_response(shown)

    return routes
