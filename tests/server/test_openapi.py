"""The served OpenAPI description is true: what fits it, or nearly fits it, is answered as it says, never with a 5xx."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
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


STREAMS = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a b c"}], "max_tokens": 3},
    "/v1/completions": {"prompt": "a b c", "max_tokens": 3},
    "/v1/responses": {"input": "a b c", "max_output_tokens": 3},
    "/v1/messages": {"messages": [{"role": "user", "content": "a b c"}], "max_tokens": 3},
}


def test_each_event_of_a_stream_is_as_described(server: RunningServer) -> None:
    document = description()
    described = schemathesis.openapi.from_dict(document)
    assert [path for path in document["paths"] if "text/event-stream" in str(document["paths"][path])] == [*STREAMS]
    for path, body in STREAMS.items():
        case = described[path]["post"].Case(body=body | {"stream": True}, media_type="application/json")
        answer = case.call(base_url=server.url)
        assert answer.status_code == 200
        assert answer.text.count("data: ") > 3
        case.validate_response(answer, checks=CHECKS)


def test_an_event_that_is_not_as_described_would_be_found(server: RunningServer) -> None:
    described = schemathesis.openapi.from_dict(description())
    for path, body in STREAMS.items():
        case = described[path]["post"].Case(body=body | {"stream": True}, media_type="application/json")
        answer = case.call(base_url=server.url)
        answer.content = answer.content.replace(b'"model":', b'"other":')
        with pytest.raises(FailureGroup):
            case.validate_response(answer, checks=CHECKS)
