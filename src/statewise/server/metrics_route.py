"""`/metrics`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from prometheus_client.exposition import choose_encoder
from starlette.responses import Response

from statewise.server.metrics import registry_of
from statewise.server.service import Service


def router(service: Service) -> APIRouter:
    routes = APIRouter()
    registry = registry_of(service)

    async def metrics(request: Request) -> Response:
        """All metrics, in the format of Prometheus or OpenMetrics."""
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"Content-Type": content_type})

    routes.add_api_route("/metrics", metrics, methods=["GET"], response_class=Response)
    routes.add_api_route("/metrics", metrics, methods=["HEAD"], include_in_schema=False)
    return routes
