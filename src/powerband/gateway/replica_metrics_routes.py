"""Prometheus service discovery for the replicas, and a proxy to their /metrics: the gateway has their API keys."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from powerband.gateway.gateway import Gateway
from powerband.web.errors import HttpError, json_response

_PATIENCE_S = 5.0


def make_routes(gateway: Gateway) -> list[Route]:
    """/metrics/targets in the form of `http_sd_configs`, and /metrics/replicas/ID."""

    async def targets(request: Request) -> Response:
        address = request.url.netloc
        return json_response(
            [
                {
                    "targets": [address],
                    "labels": {
                        "__metrics_path__": f"/metrics/replicas/{replica.id}",
                        "replica": replica.id,
                        "replica_engine": replica.engine,
                    },
                }
                for model in gateway.routes.models
                for replica in model.replicas
            ]
        )

    async def replica_metrics(request: Request) -> Response:
        id = request.path_params["id"]
        known = {replica.id: replica for model in gateway.routes.models for replica in model.replicas}
        if id not in known:
            raise HttpError(404, "replica_not_found", f"There is no replica {id[:80]!r}.")
        try:
            path = known[id].adapter.metrics_path or "/metrics"
            status, body = await gateway.upstream.fetch(known[id], path, _PATIENCE_S)
        except OSError as problem:
            raise HttpError(504, "upstream_timeout", f"Replica {id} did not return its metrics: {problem}.") from None
        if status != 200:
            raise HttpError(502, "upstream_failed", f"Replica {id} answered GET {path} with {status}.")
        return Response(body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    return [
        Route("/metrics/targets", targets, methods=["GET"]),
        Route("/metrics/replicas/{id:path}", replica_metrics, methods=["GET"]),
    ]
