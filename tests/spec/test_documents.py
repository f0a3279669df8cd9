"""Files that people write are read within bounds, and say what is out of them, whoever reads them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from powerband.cli.gateway.gateway import read_routes
from powerband.documents import parse_table, read_json_table
from powerband.errors import EnvironmentFault, UsageError
from powerband.files import make_private_folder, write_atomically
from powerband.server.settings import ServerSettings
from powerband.spec.hardware.catalog import read_prices, read_profile
from powerband.spec.plan import read_plan
from powerband.spec.settings import EngineSettings
from powerband.spec.settings_layers import resolve

NINE = ",".join("x" * 9)
LAUGHS = f"a: &a [{NINE}]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)
MERGES = "a0: &a0 {k: v}\n" + "".join(f"a{i}: &a{i}\n  <<: [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))

HOSTILE = {
    "aliases": (LAUGHS, "100,000 values"),
    "merges": (MERGES, "100,000 values"),
    "a list that holds itself": ("a: &a [*a]\n", "holds itself"),
    "a deep list": ("a: " + "[" * 20_000 + "]" * 20_000, "deeper than 64|maximum nesting depth"),
    "deep tables": ("".join("  " * level + "a:\n" for level in range(100)), "deeper than 64"),
    "a huge number": ("version: " + "9" * 5000, "characters|digits"),
    "a large number": ("version: " + "9" * 4000, "4,000 digits"),
    "a binary number": ("version: 0b" + "1" * 4000, "digits"),
    "a long name": ("n" * 10_000 + ": 1\n", "10,000 characters|simple key"),
    "a long value": ("name: " + "n" * 10_000, "10,000 characters; the limit is 4,096"),
    "a name twice": ("a: 1\nb: 2\na: 3\n", "line 3: 'a' occurs twice"),
    "an object": ("version: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
    "not valid UTF-8": (b"\xff\xfe\x00", "byte 0 is not valid UTF-8"),
    "no date": ("version: 2024-13-45\n", "month"),
    "two documents": ("a: 1\n---\na: 2\n", "single document"),
}


def _read_settings(path: Path) -> Any:
    kinds = (EngineSettings, ServerSettings)
    return resolve(kinds, kinds, {}, {}, path)


READERS: list[Callable[[Path], Any]] = [read_plan, read_routes, read_profile, read_prices, _read_settings]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(("content", "message"), HOSTILE.values(), ids=list(HOSTILE))
def test_every_reader_refuses_what_is_out_of_bounds(
    tmp_path: Path, read: Callable[[Path], Any], content: str | bytes, message: str
) -> None:
    path = tmp_path / "hostile.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=message) as caught:
        read(path)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("read", READERS)
def test_every_reader_says_the_same_of_what_is_not_there_or_too_large(
    tmp_path: Path, read: Callable[[Path], Any]
) -> None:
    with pytest.raises(EnvironmentFault, match=r"Cannot read .*: No such file"):
        read(tmp_path / "none.yaml")
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (5 << 20))
    with pytest.raises(UsageError, match=r"large\.yaml is not a valid .*: it is larger than [14] MiB"):
        read(large)
    large.write_bytes(b"- a\n")
    with pytest.raises(UsageError, match="it holds a list, not names and values"):
        read(large)


def test_what_people_write_is_read_as_yaml_says() -> None:
    shared = b"\xef\xbb\xbfbase: &base {a: 1, b: [1, 2]}\nmore:\n  <<: *base\n  b: *base\nnone:\n"
    base = {"a": 1, "b": [1, 2]}
    assert parse_table(shared, "f", "plan") == {"base": base, "more": {**base, "b": base}, "none": None}
    assert parse_table(b'{"a": [1, {"b": null}]}', "f", "plan") == {"a": [1, {"b": None}]}
    assert parse_table(b"", "f", "plan") == {}


def test_json_has_the_same_bounds_but_long_values(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"template": "x" * 100_000, "n": 2**64}))
    assert read_json_table(path, "configuration", max_bytes=1 << 20)["n"] == 2**64
    for content, message in (
        ("[" * 100_000, "deeper than 64"),
        ('{"a":' * 100 + "1" + "}" * 100, "deeper than 64"),
        ('{"a": ' + "9" * 4000 + "}", "4,000 digits"),
        ("[1]", "it holds a list"),
    ):
        path.write_text(content)
        with pytest.raises(UsageError, match=message):
            read_json_table(path, "configuration", max_bytes=1 << 20)


def test_a_file_that_cannot_be_written_whole_leaves_the_old_one_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.json"
    write_atomically(path, b"old", private=True)
    assert path.stat().st_mode & 0o777 == 0o600

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert [(one.name, one.read_bytes()) for one in tmp_path.iterdir()] == [("state.json", b"old")]


def test_private_folders_are_private_with_all_that_is_made_above_them(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        make_private_folder(tmp_path / "a" / "b" / "c")
    finally:
        os.umask(before)
    for folder in ("a", "a/b", "a/b/c"):
        assert (tmp_path / folder).stat().st_mode & 0o777 == 0o700
