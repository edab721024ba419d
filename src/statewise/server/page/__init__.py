"""The page at `/`: static files of this package, read once, and the headers that keep them to themselves.

The files are public and hold no data; what they show they ask the API for, with the key that the reader gives them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from hashlib import sha256
from importlib.resources import files

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # What a model writes is text: the browser refuses every way of making it markup.
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def _assets() -> dict[str, tuple[str, bytes]]:
    """Media type and content by path."""
    found = {}
    for file in files(__package__).joinpath("static").iterdir():
        suffix = file.name[file.name.rfind(".") :]
        path = "/" if file.name == "index.html" else f"/page/{file.name}"
        if suffix in TYPES:
            found[path] = (TYPES[suffix], file.read_bytes())
    return found


ASSETS = _assets()
PATHS = tuple(sorted(ASSETS))
"""What can be read without a key."""


def router() -> APIRouter:
    routes = APIRouter(include_in_schema=False)
    for path, (media_type, content) in ASSETS.items():
        routes.add_api_route(path, _endpoint(media_type, content), methods=["GET", "HEAD"])
    return routes


def _endpoint(media_type: str, content: bytes) -> Callable[[Request], Awaitable[Response]]:
    tag = f'"{sha256(content).hexdigest()[:32]}"'
    headers = {**HEADERS, "ETag": tag}

    async def asset(request: Request) -> Response:
        asked = [one.strip().removeprefix("W/") for one in request.headers.get("if-none-match", "").split(",")]
        if tag in asked or "*" in asked:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=media_type)

    return asset
