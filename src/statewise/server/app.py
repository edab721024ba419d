"""The application: routes over one service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from statewise import __version__
from statewise.engine.tokenizer import Tokenizer
from statewise.server import (
    chat,
    completions,
    errors,
    figures,
    metrics_route,
    models,
    openapi,
    page,
    responses,
    sessions,
)
from statewise.server.dialect import Dialect
from statewise.server.engine_client import EngineClient
from statewise.server.service import Service
from statewise.server.settings import ServerSettings
from statewise.server.text import TextSide
from statewise.server.tracing import Tracer


def create_app(
    engine: EngineClient,
    tokenizer: Tokenizer | None,
    settings: ServerSettings,
    dialect: Dialect | None = None,
    *,
    tracer: Tracer | None = None,
    startup: Callable[[], Coroutine[Any, Any, None]] | None = None,
) -> FastAPI:
    """The routes without the guards around them. The engine is started and closed with the application; `startup` is
    run beside the loading."""
    text = TextSide(
        tokenizer,
        lambda: engine.info.vocab_size if engine.info else 1 << 31,
        settings.render_seconds,
        lambda: engine.info.max_length if engine.info else None,
    )
    service = Service(engine, text, dialect or Dialect(tokenizer), settings)
    service.tracer = tracer

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        beside = asyncio.create_task(startup()) if startup is not None else None
        try:
            yield
        finally:
            if beside is not None:
                if engine.phase != "dead":  # of which it has something to say
                    beside.cancel()
                await asyncio.gather(beside, return_exceptions=True)
            await engine.close()
            text.close()

    # The pages that FastAPI has for its document load scripts from elsewhere.
    app = FastAPI(title="Statewise", version=__version__, lifespan=life, docs_url=None, redoc_url=None)
    app.state.service = service
    errors.install(app)
    for module in (completions, chat, responses, models, sessions, metrics_route, figures):
        app.include_router(module.router(service))
    if settings.page:
        app.include_router(page.router())
    openapi.describe(app)
    return app
