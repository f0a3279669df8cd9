"""Every drill gets `figures`, which it fills; they are written down when it ends, passed or not."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from drills_for_tests import Figures


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]  # pluggy's own type is not exported
    if report.when == "call":
        item.stash[_PASSED] = report.passed


_PASSED = pytest.StashKey[bool]()


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """Drills measure: not two of a checkout at the same time."""
    here = hashlib.sha256(__file__.encode()).hexdigest()[:8]
    with (Path(tempfile.gettempdir()) / f"powerband-drills-{os.getuid()}-{here}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture
def figures(request: pytest.FixtureRequest, _alone: None) -> Iterator[Figures]:
    """Named by the drill's docstring."""
    says = (request.function.__doc__ or request.node.name).split("\n")[0].rstrip(".")
    found, start_s = Figures(says), time.monotonic()
    yield found
    found.write(request.node.stash.get(_PASSED, False), time.monotonic() - start_s)
