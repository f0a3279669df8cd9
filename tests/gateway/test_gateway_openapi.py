"""What fits the description of our API, or nearly fits it, never becomes a fault of the gateway or of its replica."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from gateways_for_tests import RunningGateway, gateway_before
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

from powerband.mock_server.behavior import Behavior

sys.path.append(str(Path(__file__).parents[1] / "server"))
from test_openapi import description

PATHS = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    with gateway_before(tmp_path_factory.mktemp("gateway"), Behavior(tpot_s=0.0001)) as running:
        yield running
        assert "Traceback" not in (running.database.parent / "gateway.log").read_text()


@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize("path", PATHS)
def test_no_request_is_the_gateways_fault(gateway: RunningGateway, path: str, mode: GenerationMode) -> None:
    operation = schemathesis.openapi.from_dict(description())[path]["post"]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=30,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def hold(case: schemathesis.Case) -> None:
        answer = case.call(base_url=gateway.url)
        is_late = answer.status_code == 503 and answer.json()["error"]["code"] == "deadline_infeasible"
        assert answer.status_code < 500 or is_late, answer.text

    hold()
    assert gateway.http.get("/readyz").status_code == 200


BAD_TEXT = [b'{"prompt": "a", "\xff": 1}', b'{"prompt": "a", "x": "\xff"}', b'{"prompt": "a", "cache_salt": 1e999}']


@pytest.mark.parametrize("body", [*BAD_TEXT, b'{"prompt": "a", "stream": true, "stream_options": {"\xff": 1}}'])
@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
def test_what_cannot_be_decoded_is_refused_wherever_it_stands(gateway: RunningGateway, path: str, body: bytes) -> None:
    answer = gateway.http.post(path, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in ((400,) if b"\xff" in body or path != "/tokenize" else (400, 404, 503))
