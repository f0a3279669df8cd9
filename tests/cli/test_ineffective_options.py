"""An option that would have no effect is an error that says why."""

from __future__ import annotations

import ast
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from powerband.errors import UsageError
from powerband.server.ineffective_options import RULES, check_effects
from powerband.server.settings import ServerSettings
from powerband.spec.settings import EngineSettings
from powerband.spec.settings_layers import resolve

KNOWN = (EngineSettings, ServerSettings)
SOURCE = Path(__file__).resolve().parents[2] / "src" / "powerband"
# Per rule, in their order: settings that break it on a device, and a neighbour that is fine on a device.
CASES: list[tuple[dict[str, Any], str, dict[str, Any], str]] = [
    ({"revision": "main"}, "cpu", {"revision": "main", "model": "org/name"}, "cpu"),
    ({"threads": 2}, "cuda", {"threads": 2}, "cpu"),
    ({"kernels": "off"}, "cuda", {"kernels": "off"}, "cpu"),
    ({"enforce_eager": True}, "cpu", {"enforce_eager": True}, "cuda"),
    ({"gpu_memory_utilization": 0.5, "kv_cache_memory": "1GiB"}, "cuda", {"kv_cache_memory": "1GiB"}, "cuda"),
    ({"gpu_memory_utilization": 0.5}, "cpu", {"gpu_memory_utilization": 0.5}, "cuda"),
    ({"long_prefill_token_threshold": 2048}, "cpu", {"long_prefill_token_threshold": 2047}, "cpu"),
    ({"max_lora_rank": 8}, "cpu", {"max_lora_rank": 8, "max_loras": 1}, "cpu"),
    ({"api_key_file": "key", "api_key": "secret"}, "cpu", {"api_key_file": "key"}, "cpu"),
    ({"insecure": True, "api_key": "secret"}, "cpu", {"insecure": True, "host": "::"}, "cpu"),
]


def check(given: dict[str, Any], device: str) -> None:
    check_effects(resolve(KNOWN, KNOWN, given, {}, None), lambda: device)


def test_every_rule_has_a_case() -> None:
    assert [rule.setting for rule in RULES] == [next(iter(broken)) for broken, *_ in CASES]


@pytest.mark.parametrize(("broken", "device", "fine", "fine_device"), CASES)
def test_idle_option_is_refused_with_its_reason(
    broken: dict[str, Any], device: str, fine: dict[str, Any], fine_device: str
) -> None:
    rule = RULES[[case[0] for case in CASES].index(broken)]
    with pytest.raises(UsageError) as caught:
        check(broken, device)
    assert caught.value.message == f"{rule.setting} would have no effect: {rule.reason}."
    assert "command line" in caught.value.hint
    check(fine, fine_device)


def test_defaults_are_never_refused() -> None:
    check({}, "cpu")
    check({}, "cuda")


def test_device_is_looked_for_only_when_it_matters() -> None:
    def unexpected() -> str:
        raise AssertionError("the device was looked for")

    check_effects(resolve(KNOWN, KNOWN, {"max_num_seqs": 4}, {}, None), unexpected)


@cache
def attributes_read() -> set[str]:
    """By code outside the settings and the command line."""
    trees = [
        ast.parse(path.read_text())
        for path in SOURCE.rglob("*.py")
        if path.name != "settings.py" and path.parent.name != "cli"
    ]
    return {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize("setting", [item.name for settings in KNOWN for item in fields(settings)])
def test_every_setting_is_read_by_what_it_is_for(setting: str) -> None:
    """None is accepted and then ignored: the engine or the server reads each one."""
    assert setting in attributes_read()
