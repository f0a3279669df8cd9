"""The C++ kernels for CPUs against plain torch. The tier is the machine's own, or POWERBAND_KERNEL_TIER.

With `--fewer-cases` each test runs with every value of each of its parameters, but not with every combination of them.
"""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest

from powerband.engine.kernels.cpu import library


@pytest.fixture(autouse=True, scope="session")
def kernels() -> library.Status:
    status = library.load()
    if status.tier is None:
        pytest.skip(f"no CPU kernels: {status.reason}")
    return status


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--fewer-cases"):
        return
    cases: dict[tuple[str, str], list[pytest.Item]] = defaultdict(list)
    for item in items:
        cases[str(item.path), getattr(item, "originalname", item.name)].append(item)
    kept = {item for found in cases.values() for item in every_value_once(found)}
    items[:] = [item for item in items if item in kept]


def every_value_once(cases: list[pytest.Item]) -> list[pytest.Item]:
    """The case with most values that no other has had, and so on until none is missing; of equals, the rarest."""
    values = {item: {(name, id(value)) for name, value in parameters(item).items()} for item in cases}
    missing: set[tuple[str, int]] = set().union(*values.values())
    times: Counter[tuple[str, int]] = Counter()
    kept = []
    while missing:
        kept.append(max(cases, key=lambda item: (len(values[item] & missing), -sum(times[v] for v in values[item]))))
        missing -= values[kept[-1]]
        times.update(values[kept[-1]])
    return kept


def parameters(item: pytest.Item) -> dict[str, object]:
    return item.callspec.params if hasattr(item, "callspec") else {"no parameter": None}
