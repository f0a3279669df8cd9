"""`powerband devices`: the catalog as a table, a profile as a file, prices of one's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from model_configs import LLAMA_8B
from powerband.cli.main import main
from powerband.cost.latency import LatencyModel
from powerband.spec.deployment import Replica
from powerband.spec.hardware.catalog import load_catalog
from powerband.spec.hardware.profile import DeviceProfile
from powerband.spec.model.reader import read_model_spec


def test_the_table_names_every_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n{name} " in shown for name in load_catalog().profiles)


def test_a_profile_can_be_saved_and_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices", "l4"]) == 0
    file = tmp_path / "mine.yaml"
    file.write_text(capsys.readouterr().out)
    assert DeviceProfile.from_dict(yaml.safe_load(file.read_text())) == load_catalog().find("L4")


def test_prices_of_ones_own_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prices = tmp_path / "prices.yaml"
    prices.write_text("L4: 0.12\n")
    assert main(["devices", "--prices", str(prices), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert next(p for p in shown if p["name"] == "L4")["prices"][0]["usd_per_hour"] == 0.12


@pytest.mark.parametrize(
    ("name", "evidence"), [("L4", "prior"), ("A10G", "prior"), ("A100-40G", "prior"), ("H100", "measured")]
)
def test_a_speed_taken_from_relatives_is_not_called_measured(
    name: str, evidence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["devices"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{name} "))
    band = LatencyModel(
        read_model_spec(LLAMA_8B), load_catalog().find(name), Replica(device=name, max_model_len=8192), "vllm"
    ).band
    assert row.rstrip().endswith(f"±{band:.0%} ({evidence})")  # the band that plans use


def test_prices_are_those_of_the_provider_that_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices", "--provider", "aws"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert "aws g6.xlarge" in rows["L4"]
    assert "gcp" not in "".join(rows.values())
    assert " - " in rows["MI300X"]


@pytest.mark.parametrize("name", ["A100 80GB", "a100_80gb", "A100-80g", "NVIDIA A100-SXM4-80GB"])
def test_a_device_is_found_with_any_separators(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices", name]) == 0
    assert capsys.readouterr().out.startswith("name: A100-80G\n")


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["devices", "l5"], 2, "There is no device 'l5' in the catalog."),
        (["devices", "L40"], 2, "Did you mean L40S?"),
        (["devices", "4090"], 2, "Did you mean RTX-4090?"),
        (["devices", "H1000"], 2, "Did you mean H100"),
        (["devices", "gpu"], 2, "'local' is this machine."),
        (["devices", "--provider", "amazon"], 2, "No price of the provider 'amazon' is known."),
        (["devices", "--prices", "/nowhere.yaml"], 3, "Cannot read /nowhere.yaml"),
        (["devices", "/nowhere.yaml"], 3, "Cannot read /nowhere.yaml"),
    ],
)
def test_what_is_wrong_is_told(
    arguments: list[str], code: int, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == code
    assert sentence in capsys.readouterr().err
