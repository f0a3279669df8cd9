"""One server for all tests that change nothing in it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from servers_for_tests import RunningServer, running_server


@pytest.fixture(scope="session")
def server() -> Iterator[RunningServer]:
    """Shared by tests that leave it as they found it."""
    with running_server() as running:
        yield running
