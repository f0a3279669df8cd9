"""Dataclasses from tables of a file and back, on the profile of a device."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from powerband.errors import UsageError
from powerband.spec.hardware.profile import DeviceProfile

FACTS = """
name: L4
kind: cuda
architecture: ada
memory_bytes: 24e9
bandwidth_bytes_per_s: 300e9
peak_flops_per_s: {16bit: 121e12, fp8: 242e12}
multiprocessors: 58
host_link: {name: pcie4, bytes_per_s: 31.5e9}
prices:
  - {usd_per_hour: 0.8048, where: AWS g6.xlarge, source: list price}
all_reduce:
  '*':
    2: {latency_s: 5e-6, bytes_per_s: 19e9, evidence: {source: prior, error: 0.4}}
gemm:
  '*':
    none: {compute_share: 0.5, memory_share: 0.8, overhead_s: 3e-6, evidence: {source: prior, error: 0.35}}
"""


def facts(**changes: Any) -> dict[str, Any]:
    return {**yaml.safe_load(FACTS), **changes}


def test_a_profile_is_read_and_written_without_loss() -> None:
    profile = DeviceProfile.from_dict(facts())
    assert profile.memory_bytes == 24_000_000_000
    assert profile.gemm["*"]["none"].sharpness == 2.0
    assert profile.all_reduce["*"][2].evidence.error == 0.4
    assert [price.usd_per_hour for price in profile.prices] == [0.8048]
    assert DeviceProfile.from_dict(yaml.safe_load(yaml.safe_dump(profile.as_dict()))) == profile
    assert "watts" not in profile.as_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory_gb": 24}, "'memory_gb' is unknown"),
        ({"memory_bytes": "much"}, "memory_bytes: 'much' is not a whole number"),
        ({"memory_bytes": -1}, "memory_bytes: -1 is not a whole number of 0 or more"),
        ({"memory_bytes": 0}, "memory_bytes must be above 0"),
        ({"bandwidth_bytes_per_s": float("nan")}, "bandwidth_bytes_per_s: nan is not a number"),
        ({"kind": "gpu"}, "kind: 'gpu' is none of them. Known: cpu, cuda, rocm"),
        ({"name": 4}, "name: 4 is not a text"),
        ({"prices": [{"usd_per_hour": 1, "where": "here"}]}, r"prices\[0\]: 'source' is missing"),
        ({"prices": 3}, "prices: 3 is not a list"),
        ({"host_link": 31.5}, "host_link: 31.5 is not a table"),
        ({"peak_flops_per_s": {}}, "peak_flops_per_s must name a rate"),
    ],
)
def test_what_is_wrong_in_a_profile_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        DeviceProfile.from_dict(facts(**changes))


def test_a_profile_that_is_no_table_is_refused() -> None:
    with pytest.raises(UsageError, match="is not a table"):
        DeviceProfile.from_dict([1], "mine.yaml")
