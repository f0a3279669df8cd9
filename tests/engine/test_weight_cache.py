"""Packed weights that are kept for the next start: the same answers, and never a wrong one."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from checkpoint_formats import gptq, write
from engines_for_tests import TestEngine
from models_for_tests import random_model, save
from safetensors.torch import load_file

from powerband.engine import weight_cache
from powerband.engine.kernels.cpu import library
from powerband.engine.safetensors_file import SafetensorsFile

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
    assert len(list(cache.iterdir())) == 1
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
    assert len(list(cache.iterdir())) == 3
    os.utime(folder / "model.safetensors", (1, 1))  # as if it had been written again
    assert start(folder, monkeypatch).read
    assert len(list(cache.iterdir())) == 4


def test_file_is_a_safetensors_file_for_its_owner_only(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(folder, monkeypatch)
    [kept] = cache.iterdir()
    assert kept.stat().st_mode & 0o077 == 0
    assert load_file(kept)["layers.0.mlp.down/0/packed"].dtype is torch.uint8


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


@pytest.mark.parametrize("damage", [truncate, cut_to_nothing, change_type, overwrite_header, exchange_products])
def test_damaged_file_is_written_again(
    damage: Any, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = start(folder, monkeypatch)
    [kept] = cache.iterdir()
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
    assert list(cache.iterdir()) == []


def test_place_that_cannot_be_written_is_a_warning(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.mkdir()
    cache.write_text("a file where the folder would be")
    start(folder, monkeypatch)
    assert "could not be written" in caplog.text


def test_least_recently_used_goes_first(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(folder, monkeypatch, quantization="int8")
    [int8] = cache.iterdir()
    start(folder, monkeypatch)
    [int4] = set(cache.iterdir()) - {int8}
    os.utime(int4, (100, 100))
    os.utime(int8, (50, 50))
    start(folder, monkeypatch, quantization="int8")  # used again
    sizes = [path.stat().st_size for path in (int4, int8)]
    monkeypatch.setattr(weight_cache, "LIMIT_BYTES", sum(sizes) + 1)
    start(folder, monkeypatch, quantize_head=False)
    left = set(cache.iterdir())
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
    assert all(path.suffix == ".safetensors" for path in cache.iterdir())


def test_nothing_is_kept_of_what_is_not_quantized_or_not_asked_for(folder: Path, cache: Path) -> None:
    for settings in ({"weight_cache": "off"}, {"quantization": "none"}, {"load_format": "dummy"}):
        with TestEngine(folder, **{**SETTINGS, **settings}):
            pass
    assert not cache.exists()
