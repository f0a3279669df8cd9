"""JSON files of checkpoints and of the load generator: within bounds, and errors that name the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from powerband.bench.report.result_files import RUN_FILE, read_run
from powerband.errors import PowerbandError
from powerband.mock_server.behavior import Behavior
from powerband.spec.checkpoint.files import indexed_files
from powerband.spec.checkpoint.safetensors import read_header
from powerband.spec.model.reader import read_end_token_ids
from powerband.spec.workload.traces import read_trace
from powerband.text.added_tokens import read_table
from powerband.text.tokenizer import Tokenizer

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%b\nsize 12\n" % (b"4" * 64)
HOSTILE = {
    "a deep list": b"[" * 100_000,
    "a deep table": b'{"a":' * 100 + b"1" + b"}" * 100,
    "a huge number": b'{"weight_map":' + b"9" * 5000 + b"}",
    "millions of lists": b'{"a":[' + b"[]," * 2_000_000 + b"1]}",
    "no UTF-8": b'{"a": "\xff"}',
    "no JSON": b"{",
}


def _header(path: Path) -> Any:
    content = path.read_bytes()
    path.write_bytes(len(content).to_bytes(8, "little") + content)
    return read_header(path)


def _trace(path: Path) -> Any:
    return read_trace(path, format="mooncake", count_tokens=len)


def _talks(path: Path) -> Any:
    return read_trace(path, format="sharegpt", count_tokens=len)


def _run(path: Path) -> Any:
    path.rename(path.parent / RUN_FILE)
    return read_run(path.parent)


def _script(path: Path) -> Any:
    return Behavior.from_json(path.read_text(errors="surrogateescape"))


READERS = [indexed_files, _header, read_table, _trace, _talks, _run, _script]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("content", HOSTILE.values(), ids=list(HOSTILE))
def test_every_reader_of_json_refuses_what_is_out_of_bounds(
    tmp_path: Path, read: Callable[[Path], Any], content: bytes
) -> None:
    path = tmp_path / "hostile.json"
    path.write_bytes(content)
    with pytest.raises(PowerbandError) as caught:
        read(path)
    assert len(str(caught.value)) < 700


def test_a_git_lfs_pointer_is_called_one_wherever_it_lies(tmp_path: Path) -> None:
    for name, read in (
        ("model.safetensors", read_header),
        ("model.safetensors.index.json", indexed_files),
        ("tokenizer_config.json", read_table),
        ("config.json", read_end_token_ids),
        ("tokenizer.json", lambda path: Tokenizer.load(path.parent)),
    ):
        (tmp_path / name).write_bytes(POINTER)
        with pytest.raises(PowerbandError, match=r"is a Git LFS pointer") as caught:
            read(tmp_path / name)
        assert name in caught.value.message
        assert "git lfs pull" in f"{caught.value.message} {caught.value.hint}"
        (tmp_path / name).unlink()


@pytest.mark.parametrize(("value", "ids"), [(-1, ()), ([2, -1], (2,)), (None, ()), (7, (7,))])
def test_an_end_token_of_minus_one_is_none(tmp_path: Path, value: Any, ids: tuple[int, ...]) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    assert read_end_token_ids(tmp_path / "generation_config.json") == ids
