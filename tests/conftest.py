"""What holds for all tests: Ctrl-C works in what they start, no example has a time limit, and they run in parts whose
counts are added up.

`--fast` leaves out what takes seconds; `--slow` runs just that. `--save-counts FILE` keeps how many tests passed;
`--add-counts FOLDER` runs no test, and its last line counts those of all such files.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

TESTS = Path(__file__).parent
SLOW_FILES = [TESTS / line for line in (TESTS / "slow_files.txt").read_text().splitlines() if not line.startswith("#")]
PAGES_FILE = "docs/test_pages_run.py"
SLOW_FOLDERS = {TESTS / "drills", TESTS / "benchmarks", TESTS / "kernels"}

# A shell starts what it runs in the background with Ctrl-C ignored, and children inherit that: programs that the tests
# start and then interrupt would go on.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes depends on what else the machine does.
settings.register_profile("powerband", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("powerband")

COUNTED = ("passed", "skipped", "xfailed", "xpassed")  # a part with failures is the last one


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="leave out slow_files.txt and tests that are marked slow")
    parser.addoption("--slow", action="store_true", help="run only what --fast leaves out")
    parser.addoption("--fewer-cases", action="store_true", help="of kernels: see engine/cpu_kernels/conftest.py")
    parser.addoption("--save-counts", type=Path, metavar="FILE", help="write how many tests passed")
    parser.addoption("--add-counts", type=Path, metavar="FOLDER", help="run no test, and count those of earlier runs")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes seconds; left out by --fast")
    missing = [str(path) for path in SLOW_FILES if not path.exists()]
    if missing:
        raise pytest.UsageError(f"tests/slow_files.txt names files that do not exist: {', '.join(missing)}")


def _is_slow(path: Path) -> bool:
    return path in SLOW_FILES or not SLOW_FOLDERS.isdisjoint((path, *path.parents))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if config.getoption("--fast") and _is_slow(collection_path) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    is_slow = {item: _is_slow(item.path) or item.get_closest_marker("slow") is not None for item in items}
    if config.getoption("--add-counts"):
        items.clear()
    if config.getoption("--fast"):
        items[:] = [item for item in items if not is_slow[item]]
    if config.getoption("--slow"):
        place = {path: number for number, path in enumerate(SLOW_FILES)}
        items[:] = sorted((item for item in items if is_slow[item]), key=lambda item: place.get(item.path, len(place)))


class FilesAndPages(LoadScopeScheduling):
    """As `--dist loadfile`: a file's tests in one process, which share its fixtures. Each documented page, which shares
    none, goes to whichever process is free.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return nodeid if file.endswith(PAGES_FILE) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    return FilesAndPages(config, log)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A package may have only fast tests, or only slow ones."""
    may_be_none = any(map(session.config.getoption, ("--fast", "--slow", "--add-counts")))
    if may_be_none and session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    stats = terminalreporter.stats
    if file := config.getoption("--save-counts"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({outcome: len(stats.get(outcome, ())) for outcome in COUNTED}))
    if folder := config.getoption("--add-counts"):
        for path in sorted(folder.glob("*.json")):
            counts = {outcome: count for outcome, count in json.loads(path.read_text()).items() if count}
            shown = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
            terminalreporter.write_line(f"{path.stem}: {shown}")
            for outcome, count in counts.items():
                stats.setdefault(outcome, []).extend(SimpleNamespace(count_towards_summary=True) for _ in range(count))
