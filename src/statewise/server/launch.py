"""From the command line's options to a running server."""

from __future__ import annotations

import logging
import socket
import sys
from pathlib import Path
from typing import Any

import uvicorn

from statewise.engine.tokenizer import Tokenizer
from statewise.models.registry import model_directory
from statewise.server.app import create_app
from statewise.server.engine_client import EngineClient
from statewise.server.guards.connection import BoundedHttp
from statewise.server.guards.stack import GuardSettings, guarded
from statewise.server.keys import load_keys
from statewise.server.run import Server
from statewise.server.settings import ServerSettings


def launch(model: str, arguments: dict[str, Any], options: dict[str, Any]) -> None:
    """Serve until told to stop. `arguments` are those of `LLM`. Raises `StatewiseError` for what cannot be served."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    tokenizer = Tokenizer.from_directory(model_directory(model))
    settings = ServerSettings(
        model_name=options["served_model_name"] or Path(model).name,
        max_queued=options["max_queued"],
        drain_seconds=options["drain_seconds"],
    )
    engine = EngineClient(model, arguments, restart=options["restart_engine"])
    app = create_app(engine, tokenizer, settings)
    guards = GuardSettings(
        bind=options["host"],
        hosts=tuple(options["hosts"]),
        origins=tuple(options["cors_origins"]),
        keys=load_keys(file=options["api_key_file"]),
        log_json=options["log_json"],
    )
    config = uvicorn.Config(
        guarded(app, guards),
        host=options["host"],
        port=options["port"],
        ssl_certfile=options["tls_certificate"],
        ssl_keyfile=options["tls_key"],
        log_config=None,
        access_log=False,
        server_header=False,
        http=BoundedHttp,
        ws="none",
        lifespan="on",
    )
    listener = _listener(options["host"], options["port"])
    scheme = "https" if options["tls_certificate"] else "http"
    host = f"[{options['host']}]" if ":" in options["host"] else options["host"]
    logging.getLogger(__name__).info("serving %s at %s://%s:%d", model, scheme, host, listener.getsockname()[1])
    Server(config, app.state.service).run(sockets=[listener])


def _listener(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=2048)
