"""The reader of headers, against the safetensors library: what it takes, the library takes, and reads the same."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from powerband.errors import EnvironmentFault
from powerband.spec.checkpoint.safetensors import Header, read_header

TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
GOOD = {"__metadata__": {"format": "pt"}, "a": TENSOR, "b": {"dtype": "BF16", "shape": [2, 1], "data_offsets": [8, 12]}}


def file_of(header: Any, data: bytes = bytes(12), *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def read_by_both(content: bytes, folder: Path) -> tuple[Header | None, dict[str, tuple[Any, ...]] | None]:
    """What we read and what the library reads; None: refused."""
    path = folder / "model.safetensors"
    path.write_bytes(content)
    ours = None
    with contextlib.suppress(EnvironmentFault):  # any other error fails the test
        ours = read_header(path)
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
            theirs = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError, ValueError):
        theirs = None
    return ours, theirs


def check(content: bytes, folder: Path) -> None:
    ours, theirs = read_by_both(content, folder)
    if ours is not None:
        assert theirs == {name: (tensor.dtype, tensor.shape) for name, tensor in ours.tensors.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**70) | st.floats() | st.text(max_size=5) | st.sampled_from(["F32"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
PLACES: list[tuple[Any, ...]] = [(), ("__metadata__",), ("__metadata__", "format"), ("c",), ("a",), ("a", "x")]
PLACES += [("a", "dtype"), ("a", "shape"), ("a", "shape", 0), ("a", "data_offsets"), ("a", "data_offsets", 1)]
PLACES += [("b", "data_offsets", 0), ("b", "shape", 1)]


@settings(max_examples=200)
@given(place=st.sampled_from(PLACES), value=_values)
@example(place=("__metadata__",), value=7)
@example(place=("__metadata__",), value=["a"])
@example(place=("a", "shape", 0), value=True)
@example(place=("a", "shape", 0), value=2.0)
@example(place=("a", "data_offsets"), value=None)
@example(place=("a",), value={**TENSOR, "dtype": "F4"})
def test_any_value_in_any_place_of_a_header(place: tuple[Any, ...], value: Any, folder: Path) -> None:
    header: Any = json.loads(json.dumps(GOOD))
    if not place:
        header = value
    else:
        within = header
        for key in place[:-1]:
            within = within[key]
        within[place[-1]] = value
    check(file_of(header), folder)


@settings(max_examples=200)
@given(
    edits=st.lists(st.tuples(st.integers(0, 250), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.none() | st.integers(0, 250),
)
def test_any_bytes_changed_or_cut(edits: list[tuple[int, int]], cut: int | None, folder: Path) -> None:
    content = bytearray(file_of(GOOD))
    for place, byte in edits:
        content[place % len(content)] = byte
    check(bytes(content[:cut]), folder)


@settings(max_examples=200)
@given(content=st.binary(max_size=80))
def test_any_bytes(content: bytes, folder: Path) -> None:
    check(content, folder)
    check(file_of(content, b""), folder)


REFUSED = {
    "a name twice": file_of(b'{"a":%b,"a":%b}' % ((json.dumps(TENSOR).encode(),) * 2), bytes(8)),
    "half a surrogate pair": file_of(b'{"\\ud800":%b}' % json.dumps(TENSOR).encode(), bytes(8)),
    "UTF-16": file_of(json.dumps(GOOD).encode("utf-16")),
    "a gap": file_of({"a": TENSOR, "b": {**TENSOR, "data_offsets": [9, 17]}}, bytes(17)),
    "bytes behind the last": file_of({"a": TENSOR}, bytes(9)),
    "an empty shape that overflows": file_of(
        {"a": {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}, b""
    ),
    "a number of a million digits": file_of(b'{"a":' + b"9" * 1_000_000 + b"}", b""),
    "a deep header": file_of(b"[" * 200_000, b""),
    "a length beyond the file": file_of(GOOD, length=1 << 62),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(kind: str, folder: Path) -> None:
    ours, _ = read_by_both(REFUSED[kind], folder)
    assert ours is None


def test_what_the_library_writes_is_read(folder: Path) -> None:
    ours, theirs = read_by_both(file_of(GOOD), folder)
    assert ours is not None
    assert theirs == {name: (tensor.dtype, tensor.shape) for name, tensor in ours.tensors.items()}
    assert ours.metadata == {"format": "pt"}


@pytest.mark.parametrize("place", ["/dev/zero", "/proc/self/mem", "/nowhere/model.safetensors", "/tmp"])
def test_what_is_no_file_is_refused(place: str) -> None:
    with pytest.raises(EnvironmentFault):
        read_header(Path(place))
