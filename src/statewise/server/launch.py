"""From the command line's options to a running server."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import uvicorn

from statewise.engine.tokenizer import Tokenizer
from statewise.errors import ConfigError
from statewise.models.directory import model_directory
from statewise.server import logs, page
from statewise.server.app import create_app
from statewise.server.dialect import Dialect
from statewise.server.engine_client import EngineClient
from statewise.server.guards.connection import BoundedHttp
from statewise.server.guards.stack import GuardSettings, guarded
from statewise.server.keys import load_keys
from statewise.server.listen import listen, url_of
from statewise.server.run import Server
from statewise.server.sessions import IMPORT
from statewise.server.settings import ServerSettings
from statewise.server.startup import LogReport, Report, say
from statewise.server.tracing import exporting

logger = logging.getLogger(__name__)
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def launch(model: str, arguments: dict[str, Any], options: dict[str, Any], report: Report | None = None) -> bool:
    """Serve until told to stop. `arguments` are those of `LLM`; `report` is told of the start, else the log is. Raises
    `StatewiseError` for what cannot be served, and gives False for a model that could not be loaded."""
    logs.configure(options["log_json"])
    if options["host"] not in LOOPBACK and options["api_key_file"] is None:
        logger.warning("everybody who reaches this address can use the model; give --api-key-file")
    directory = model_directory(model)
    tokenizer = Tokenizer.from_directory(directory)
    dialect = Dialect.of(directory, tokenizer, options["answer_format"])
    settings = ServerSettings(
        model_name=options["served_model_name"] or Path(model).name,
        max_queued=options["max_queued"],
        max_choices=options["max_choices"],
        max_sessions=options["max_sessions"],
        session_ttl_s=options["session_ttl"],
        drain_seconds=options["drain_seconds"],
        page=options["page"],
    )
    keys = load_keys(file=options["api_key_file"])
    tracer = exporting(options["otlp_endpoint"], settings.model_name) if options["otlp_endpoint"] else None
    listener = listen(options["host"], options["port"], options["unix_socket"])
    url = url_of(listener, options["host"], tls=options["tls_certificate"] is not None)
    engine = EngineClient(model, arguments, restart=options["restart_engine"], log_json=options["log_json"])
    said = report or LogReport(options["log_json"])
    app = create_app(engine, tokenizer, settings, dialect, tracer=tracer, startup=lambda: say(engine, url, said))
    guards = GuardSettings(
        bind=options["host"],
        hosts=tuple(options["hosts"]),
        origins=tuple(options["cors_origins"]),
        keys=keys,
        open_paths=("/health", *page.PATHS) if settings.page else ("/health",),
        observe=engine.seen.answered,
        files={IMPORT: options["max_import"]},
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
    _load(config)
    logger.info("serving %s at %s", model, url)
    try:
        Server(config, app.state.service).run(sockets=[listener])
    finally:
        if options["unix_socket"] is not None:
            options["unix_socket"].unlink(missing_ok=True)
        if tracer is not None:
            tracer.close()
    return engine.info is not None or engine.failure is None


def _load(config: uvicorn.Config) -> None:
    """Read the files of TLS before anything is promised. Raises `ConfigError`."""
    if config.ssl_keyfile and not config.ssl_certfile:
        raise ConfigError("--tls-key needs the certificate that belongs to it: give --tls-certificate too")
    try:
        config.load()
    except OSError:  # what the ssl module raises is one, too
        raise ConfigError(
            "--tls-certificate and --tls-key cannot be used: give PEM files of a certificate and of its own key"
        ) from None
