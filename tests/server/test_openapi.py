"""The served OpenAPI description is true: what fits it, or nearly fits it, is answered as it says, never with a 5xx."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from servers_for_tests import RunningServer

from powerband.server.app import operations
from powerband.server.openapi import describe
from powerband.server.replica import ServerState
from powerband.server.settings import ServerSettings
from powerband.spec.settings import EngineSettings

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


def description() -> dict[str, Any]:
    async def make() -> dict[str, Any]:
        return describe(operations(ServerState(EngineSettings(), ServerSettings())), needs_key=False)

    return asyncio.run(make())


NOT_CALLED = ("/admin/drain", "/admin/pause")  # they end the service that the others need
CASES = [
    (path, method, mode)
    for path, methods in description()["paths"].items()
    for method, operation in methods.items()
    for mode in (GenerationMode if "requestBody" in operation else [GenerationMode.POSITIVE])
    if path not in NOT_CALLED
]


def test_the_description_is_served(server: RunningServer) -> None:
    assert server.http.get("/openapi.json").json() == description()


@pytest.mark.parametrize(("path", "method", "mode"), CASES)
def test_every_operation_keeps_its_description(
    server: RunningServer, path: str, method: str, mode: GenerationMode
) -> None:
    operation = schemathesis.openapi.from_dict(description())[path][method]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=30 if "requestBody" in operation.definition.raw else 1,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def hold(case: schemathesis.Case) -> None:
        case.call_and_validate(base_url=server.url, checks=CHECKS)

    hold()
    assert server.http.get("/readyz").status_code == 200
