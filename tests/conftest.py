"""What holds for all tests: Ctrl-C works in what they start, and `--fast` leaves out what takes seconds."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SLOW_FILES = {TESTS / line for line in (TESTS / "slow_files.txt").read_text().splitlines() if not line.startswith("#")}
SLOW_FOLDERS = {TESTS / "drills", TESTS / "benchmarks", TESTS / "kernels"}

# A shell starts what it runs in the background with Ctrl-C ignored, and children inherit that: programs that the tests
# start and then interrupt would go on.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="leave out slow_files.txt and tests that are marked slow")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes seconds; left out by --fast")
    missing = [str(path) for path in SLOW_FILES if not path.exists()]
    if missing:
        raise pytest.UsageError(f"tests/slow_files.txt names files that do not exist: {', '.join(missing)}")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    is_slow = collection_path in SLOW_FILES or collection_path in SLOW_FOLDERS
    return True if is_slow and config.getoption("--fast") else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--fast"):
        items[:] = [item for item in items if item.get_closest_marker("slow") is None]
