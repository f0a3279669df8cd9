"""Files that only repeat what somebody else knows do not keep a gateway from starting."""

from __future__ import annotations

from pathlib import Path

import pytest

from powerband.gateway.gateway import Gateway
from powerband.gateway.settings import GatewaySettings


@pytest.mark.parametrize("content", [b"", b"\0" * 64, b"[]", b'{"models": 1}', b"\xb3"])
def test_a_gateway_starts_without_stored_routes_that_are_damaged(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "routes.json"
    path.write_bytes(content)
    gateway = Gateway(GatewaySettings(), path)
    assert gateway.stored_routes() is None
    assert not path.exists()
    assert (tmp_path / "routes.json.damaged").read_bytes() == content
    assert gateway.stored_routes() is None
