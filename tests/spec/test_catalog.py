"""The catalog of devices: complete, findable by the names people use, and priced by whole machines."""

from __future__ import annotations

from pathlib import Path

import pytest

from powerband.errors import EnvironmentFault, UsageError
from powerband.spec.hardware.catalog import load_catalog, read_prices, read_profile, usd_per_hour
from powerband.spec.hardware.profile import DevicePrice
from powerband.spec.hardware.what_if import chosen_devices, pinned_settings, priced_catalog


def price(dollars: float, devices: int, where: str, confidence: str = "high") -> DevicePrice:
    return DevicePrice(usd_per_hour=dollars, devices=devices, where=where, source="test", confidence=confidence)  # type: ignore[arg-type] # one of its words


def test_every_device_says_where_its_facts_come_from() -> None:
    profiles = load_catalog().profiles
    assert len(profiles) >= 18
    for profile in profiles.values():
        assert profile.source
        assert profile.peak_flops_per_s["16bit"] > 0
        assert all(price.source for price in profile.prices)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("l4", "L4"),
        ("A100-80GB", "A100-80G"),
        ("H100-SXM", "H100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("h200", "H200"),
    ],
)
def test_devices_are_found_by_the_names_people_use(asked: str, found: str) -> None:
    assert load_catalog().find(asked).name == found


def test_no_name_means_two_devices() -> None:
    names = [n.casefold() for profile in load_catalog().profiles.values() for n in {profile.name, *profile.aliases}]
    assert len(names) == len(set(names))


def test_an_unknown_device_names_near_ones() -> None:
    with pytest.raises(UsageError, match="H100") as problem:
        load_catalog().find("H1000")
    assert "powerband devices" in problem.value.hint


def test_this_machine_has_to_be_measured_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POWERBAND_CACHE", str(tmp_path))
    with pytest.raises(EnvironmentFault) as problem:
        load_catalog().find("local")
    assert "powerband calibrate" in problem.value.hint


def test_a_device_can_be_described_by_hand(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "name: Mine\nkind: cuda\narchitecture: ada\nmemory_bytes: 48e9\nbandwidth_bytes_per_s: 600e9\n"
        "peak_flops_per_s: {16bit: 200e12}\nmultiprocessors: 100\n"
    )
    assert load_catalog().find(str(file)).memory_bytes == 48_000_000_000
    file.write_text("name: Mine\nspeed: 3\n")
    with pytest.raises(UsageError, match="speed"):
        read_profile(file)


def test_a_replica_lies_on_one_machine() -> None:
    single, eight = price(1.0, 1, "one"), price(6.0, 8, "eight")
    assert usd_per_hour([single, eight], 3, 1) == (3.0, {"one": 3})
    assert usd_per_hour([single, eight], 7, 1) == (6.0, {"eight": 1})
    assert usd_per_hour([single, eight], 9, 1) == (7.0, {"one": 1, "eight": 1})
    assert usd_per_hour([single, eight], 1, 4) == (6.0, {"eight": 1})
    assert usd_per_hour([single, eight], 3, 4) == (12.0, {"eight": 2})


def test_a_price_of_one_device_serves_for_every_layout_unless_more_is_said() -> None:
    single, four = price(1.0, 1, "one"), price(3.5, 4, "four")
    assert usd_per_hour([single], 1, 2) == (2.0, {"one": 2})
    assert usd_per_hour([single], 3, 4) == (12.0, {"one": 12})
    assert usd_per_hour([single, four], 1, 2) == (3.5, {"four": 1})  # a machine with two is listed: the one with four
    assert usd_per_hour([single, four], 1, 8) == (7.0, {"four": 2})
    assert usd_per_hour([], 1, 1) is None


def test_prices_of_one_provider(tmp_path: Path) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text("H100: 9.9\n")
    catalog = priced_catalog(file, "aws,gcp")
    assert {p.where.split()[0] for p in catalog.find("L4").prices} == {"aws", "gcp"}
    assert [p.usd_per_hour for p in catalog.find("H100").prices] == [9.9]  # a user's own count with any provider
    assert catalog.find("MI300X").prices == ()
    with pytest.raises(UsageError, match="'awss'") as problem:
        priced_catalog(None, "awss")
    assert "Did you mean aws? Known: aws, azure, gcp, lambda, runpod, vast." in problem.value.hint


@pytest.mark.parametrize("devices_each", [1, 2, 4, 8])
def test_a_what_if_price_is_that_of_one_device(devices_each: int) -> None:
    (h100,) = chosen_devices("H100", None, ["H100.price=2.5"])
    found = usd_per_hour(h100.prices, 1, devices_each)
    assert found is not None
    assert found[0] == 2.5 * devices_each


@pytest.mark.parametrize(
    ("change", "problem", "hint"),
    [
        ("L4.prize=3", "A device has no 'prize'.", "Did you mean price? Known: price, name, kind, "),
        ("L4.memory_byte=3", "A device has no 'memory_byte'.", "Did you mean memory_bytes? "),
        ("L4.link.bytes=3", "--set link.bytes: link: 'bytes' is unknown.", "Did you mean bytes_per_s? Known: name, "),
    ],
)
def test_a_wrong_name_in_a_what_if_says_what_is_meant(change: str, problem: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        chosen_devices("L4", None, [change])
    assert caught.value.message == problem
    assert caught.value.hint.startswith(hint)


def test_a_wrong_setting_of_a_replica_in_a_what_if_says_what_is_meant() -> None:
    with pytest.raises(UsageError, match="A replica has no 'max_num_seq'") as caught:
        pinned_settings(["replica.max_num_seq=3"])
    assert caught.value.hint.startswith("Did you mean max_num_seqs? Known: tensor_parallel, ")


def test_rumoured_prices_count_only_where_there_is_no_other() -> None:
    rumour, listed = price(0.3, 1, "market", "low"), price(1.0, 1, "cloud")
    assert usd_per_hour([rumour, listed], 1, 1) == (1.0, {"cloud": 1})
    assert usd_per_hour([rumour], 1, 1) == (0.3, {"market": 1})


def test_prices_of_a_user_replace_those_of_the_catalog(tmp_path: Path) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text("L4: 0.4\nH100: [{usd_per_hour: 20, devices: 8, where: our contract}]\n")
    catalog = load_catalog().with_prices(read_prices(file))
    assert usd_per_hour(catalog.find("L4").prices, 2, 1) == (0.8, {"prices.yaml": 2})
    assert usd_per_hour(catalog.find("H100").prices, 1, 4) == (20.0, {"our contract": 1})
    file.write_text("L4: cheap\n")
    with pytest.raises(UsageError, match="cheap"):
        read_prices(file)
    file.write_text("L5: 1\n")
    with pytest.raises(UsageError, match="L5"):
        load_catalog().with_prices(read_prices(file))
