"""OpenAI's own client is content with the server."""

from __future__ import annotations

import time

from openai_client_check import check
from servers_for_tests import RunningServer


def test_the_official_client(server: RunningServer) -> None:
    check(f"{server.url}/v1")
    start_s = time.monotonic()
    server.until(lambda: server.figure("powerband_requests_running") == 0)
    assert time.monotonic() - start_s < 20  # the stream that was closed early does not run on
