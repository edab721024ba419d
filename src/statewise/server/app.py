"""The application: routes over one service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from statewise import __version__
from statewise.engine.tokenizer import Tokenizer
from statewise.server import chat, completions, errors, models, sessions
from statewise.server.engine_client import EngineClient
from statewise.server.service import Service
from statewise.server.settings import ServerSettings
from statewise.server.text import TextSide


def create_app(engine: EngineClient, tokenizer: Tokenizer | None, settings: ServerSettings) -> FastAPI:
    """The routes without the guards around them. The engine is started and closed with the application."""
    text = TextSide(tokenizer, lambda: engine.info.vocab_size if engine.info else 1 << 31, settings.render_seconds)
    service = Service(engine, text, settings)

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            await engine.close()

    app = FastAPI(title="Statewise", version=__version__, lifespan=life)
    app.state.service = service
    errors.install(app)
    for module in (completions, chat, models, sessions):
        app.include_router(module.router(service))
    return app
