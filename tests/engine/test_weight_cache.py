"""Packed weights that are kept for the next start: the same answers, and never a wrong one."""

from __future__ import annotations

import json
import logging
import os
import shutil
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from checkpoint_formats import gptq, write
from engines_for_tests import TestEngine
from models_for_tests import random_model, save
from safetensors.torch import load_file, save_file

from powerband.engine.kernels.cpu import library
from powerband.engine.model_loader import weight_cache
from powerband.engine.model_loader.safetensors_file import SafetensorsFile

PROMPT = list(range(3, 40))
SETTINGS: dict[str, Any] = {"dtype": "bfloat16", "quantization": "int4", "weight_cache": "auto"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory of the test's own; the kernels come from the usual one."""
    if library.load().tier is None:
        pytest.skip("only what the CPU kernels take is kept")
    monkeypatch.setattr(weight_cache, "cache_directory", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "weights"


class Started(NamedTuple):
    tokens: list[int]
    read: list[str]  # tensors of the checkpoint that were read


def start(folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Started:
    """Start, answer, and wait until everything is written."""
    read: list[str] = []
    original = SafetensorsFile.read

    def recorded(file: SafetensorsFile, name: str, out: torch.Tensor | None = None) -> torch.Tensor:
        if file.path.is_relative_to(folder):
            read.append(name)
        return original(file, name, out)

    monkeypatch.setattr(SafetensorsFile, "read", recorded)
    with TestEngine(folder, **{**SETTINGS, **settings}) as engine:
        tokens = engine.generate([PROMPT])[0]
        if (kept := engine.engine.executor._weight_cache) is not None:
            kept.wait()
    monkeypatch.setattr(SafetensorsFile, "read", original)
    return Started(tokens, read)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(random_model("qwen3"), tmp_path / "model")


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("family", ["qwen3", "mixtral", "gemma2", "gpt_oss"])
def test_next_start_reads_no_projection_and_says_the_same(
    family: str, quantization: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(random_model(family), tmp_path / "model")
    first = start(folder, monkeypatch, quantization=quantization)
    assert any("_proj" in name for name in first.read)
    assert len(packed_files(cache)) == 1
    second = start(folder, monkeypatch, quantization=quantization)
    assert second.tokens == first.tokens
    assert not any("_proj" in name or "experts" in name for name in second.read)


def test_quantized_checkpoints_are_kept_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    folder = tmp_path / "model"
    write(folder, random_model("qwen2"), gptq, config)
    first, second = (start(folder, monkeypatch, quantization="none") for _ in range(2))
    assert second.tokens == first.tokens
    assert any(name.endswith("qweight") for name in first.read)
    assert not any(name.endswith("qweight") for name in second.read)


def test_what_the_content_depends_on_is_in_the_name(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(folder, monkeypatch)
    start(folder, monkeypatch, quantization="int8")
    start(folder, monkeypatch, quantize_head=False)
    assert len(packed_files(cache)) == 3


def fine_tune(folder: Path, *, part: str = "layers.1.mlp.down_proj.weight") -> None:
    """Other weights in one tensor, written over the file, which keeps its size and time."""
    path = folder / "model.safetensors"
    found = path.stat()
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors[f"model.{part}"][:, 5:] *= -1
    save_file(tensors, path, metadata={"format": "pt"})
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert path.stat().st_size == found.st_size


def reads_projections(started: Started) -> bool:
    return any("_proj" in name for name in started.read)


@pytest.mark.parametrize("settled_s", [0, 3600])
@pytest.mark.parametrize("in_place", [False, True])
def test_another_checkpoint_of_the_same_shape_size_and_time_is_not_taken_for_the_first(
    in_place: bool, settled_s: float, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_cache, "_SETTLED_S", settled_s)
    other = folder if in_place else tmp_path / "other"
    first = start(folder, monkeypatch)
    if not in_place:
        shutil.copytree(folder, other)  # with its times
    fine_tune(other)
    expected = start(other, monkeypatch, weight_cache="off").tokens
    assert expected != first.tokens
    for _ in range(2):
        assert start(other, monkeypatch).tokens == expected


def test_the_same_weights_are_found_in_other_files(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_cache, "_SETTLED_S", 0)
    first = start(folder, monkeypatch)
    os.utime(folder / "model.safetensors", (1, 1))
    shutil.copytree(folder, tmp_path / "copy")
    for place in (folder, tmp_path / "copy"):
        again = start(place, monkeypatch)
        assert again.tokens == first.tokens
        assert not reads_projections(again)


def test_an_unchanged_checkpoint_is_not_read_for_its_name(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_cache, "_SETTLED_S", 0)
    start(folder, monkeypatch)

    def digest(files: list[Path]) -> str:
        raise AssertionError("the whole checkpoint was read")

    monkeypatch.setattr(weight_cache, "_content_digest", digest)
    assert not reads_projections(start(folder, monkeypatch))
    [link] = cache.glob("*.known")
    assert link.readlink() == Path(packed_files(cache)[0].name)


def with_crc_of(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`tensor` with a few lowest bits of its mantissas flipped, so that the CRC-32 of its bytes is that of `other`.

    CRC-32 is linear over XOR: the flips solve 32 equations.
    """
    content = bytearray(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    have, want = (zlib.crc32(bytes(t.reshape(-1).view(torch.uint8).numpy().tobytes())) for t in (tensor, other))
    places = range(0, 2 * 48, 2)
    basis: dict[int, tuple[int, int]] = {}  # by its highest bit: a change of the CRC, and the flips that make it

    def reduced(change: int, flips: int) -> tuple[int, int]:
        while change and (known := basis.get(change.bit_length())):
            change, flips = change ^ known[0], flips ^ known[1]
        return change, flips

    for number, place in enumerate(places):
        content[place] ^= 1
        change, flips = reduced(zlib.crc32(content) ^ have, 1 << number)
        content[place] ^= 1
        if change:
            basis[change.bit_length()] = change, flips
    _, flips = reduced(have ^ want, 0)
    for number, place in enumerate(places):
        content[place] ^= flips >> number & 1
    assert zlib.crc32(content) == want
    return torch.frombuffer(content, dtype=torch.uint8).view(tensor.dtype).view(tensor.shape).clone()


def test_a_checkpoint_made_to_have_the_checksums_of_another_is_not_taken_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_cache, "_SETTLED_S", 0)
    victim, hostile = (save(random_model("llama2", seed).bfloat16(), tmp_path / str(seed)) for seed in (1, 2))
    path = hostile / "model.safetensors"
    others = load_file(victim / "model.safetensors")
    save_file({name: with_crc_of(t, others[name]) for name, t in load_file(path).items()}, path, {"format": "pt"})
    expected = start(victim, monkeypatch, weight_cache="off").tokens
    assert start(hostile, monkeypatch).tokens != expected
    assert start(victim, monkeypatch).tokens == expected


def packed_files(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.safetensors"))


def test_file_is_a_safetensors_file_for_its_owner_only(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(folder, monkeypatch)
    [kept] = packed_files(cache)
    assert kept.stat().st_mode & 0o077 == 0
    assert load_file(kept)["layers.0.mlp.down/0/packed"].dtype is torch.uint8


def zero_a_page(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-8192, os.SEEK_END)
        file.write(bytes(4096))


def turn_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def swap_a_shape(path: Path) -> None:
    """With a header that claims to be whole: what reaches the kernels must fit by itself."""
    with SafetensorsFile(path) as file:
        name = next(name for name in file.names() if name.endswith("/packed"))
        entries = {each: weight_cache._entry(file, each) for each in file.names()}
        kinds, sums = file.metadata["kinds"], file.metadata["checksums"]
        data = path.read_bytes()[file._data_start :]
    entries[name]["shape"] = file.shape(name)[::-1]
    metadata = {"digest": weight_cache._digest(entries, kinds, sums), "kinds": kinds, "checksums": sums}
    header = json.dumps({"__metadata__": metadata, **entries}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def put_a_device_in_its_place(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/null")


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def cut_to_nothing(path: Path) -> None:
    os.truncate(path, 0)


def change_type(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"I64"', b'"F64"'))


def overwrite_header(path: Path) -> None:
    path.write_bytes(b"\xff" * 64 + path.read_bytes()[64:])


def exchange_products(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"layers.0.mlp.down", b"layers.9.mlp.down"))


DAMAGES = (truncate, cut_to_nothing, change_type, overwrite_header, exchange_products)
DAMAGES += (zero_a_page, turn_a_bit, swap_a_shape, put_a_device_in_its_place)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file_is_written_again(
    damage: Any, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = start(folder, monkeypatch)
    [kept] = packed_files(cache)
    whole = kept.read_bytes()
    damage(kept)
    assert kept.read_bytes() != whole
    with caplog.at_level(logging.WARNING):
        assert start(folder, monkeypatch) == first
    assert "is damaged" in caplog.text
    assert kept.read_bytes() == whole


def test_no_room_is_a_warning(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(weight_cache, "LIMIT_BYTES", 1000)
    start(folder, monkeypatch)
    assert "too full" in caplog.text
    assert packed_files(cache) == []


def test_place_that_cannot_be_written_is_a_warning(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.mkdir()
    cache.write_text("a file where the folder would be")
    start(folder, monkeypatch)
    assert "could not be written" in caplog.text


def test_least_recently_used_goes_first(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(folder, monkeypatch, quantization="int8")
    [int8] = packed_files(cache)
    start(folder, monkeypatch)
    [int4] = set(packed_files(cache)) - {int8}
    os.utime(int4, (100, 100))
    os.utime(int8, (50, 50))
    start(folder, monkeypatch, quantization="int8")  # used again
    sizes = [path.stat().st_size for path in (int4, int8)]
    monkeypatch.setattr(weight_cache, "LIMIT_BYTES", sum(sizes) + 1)
    start(folder, monkeypatch, quantize_head=False)
    left = set(packed_files(cache))
    assert int8 in left
    assert int4 not in left
    assert len(left) == 2


def test_unfinished_files_are_removed_when_they_are_old(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir(parents=True)
    old, young = cache / "a.part", cache / "b.part"
    for path in (old, young):
        path.write_text("x")
    os.utime(old, (0, 0))
    start(folder, monkeypatch)
    assert not old.exists()
    assert young.exists()


def test_an_engine_that_ends_leaves_nothing_half_written(folder: Path, cache: Path) -> None:
    with TestEngine(folder, **SETTINGS):
        pass
    assert not list(cache.glob("*.part"))


def test_nothing_is_kept_of_what_is_not_quantized_or_not_asked_for(folder: Path, cache: Path) -> None:
    for settings in ({"weight_cache": "off"}, {"quantization": "none"}, {"load_format": "dummy"}):
        with TestEngine(folder, **{**SETTINGS, **settings}):
            pass
    assert not cache.exists()
