"""The header of a safetensors file (https://huggingface.co/docs/safetensors): which tensors it holds, and where.

    [8 bytes: length of the header][header: JSON, padded with blanks][data of all tensors, without gaps]

Everything is checked before anything is believed: a header that passes describes bytes that are in the file.
"""

from __future__ import annotations

import math
import os
import stat
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from powerband.documents import LFS_POINTER, parse_json
from powerband.errors import EnvironmentFault
from powerband.files import open_regular

LENGTH_BYTES = 8  # of the header's length, which stands before it
_MAX_HEADER_BYTES = 100_000_000  # as the safetensors library
_MAX_DIMENSIONS = 64
_MAX_ELEMENTS = 1 << 56  # empty dimensions count as one: strides are computed with all of them
_BITS = {
    **{"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16},
    **{"I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8},
    **{"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4},
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One entry of a header. Its bytes are [start, end), counted from the start of the file's data."""

    dtype: str  # as the format calls it: "BF16"
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """All tensors of a file by name, and the position in the file at which the data begins."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]
    data_start: int


def unreadable(path: Path, problem: Exception) -> EnvironmentFault:
    """The error for a file that is damaged, whatever the library said."""
    reason = str(problem)[:300] or type(problem).__name__
    return EnvironmentFault(
        f"{path} cannot be read: {reason}.",
        hint="The file is damaged or incomplete; fetch it again.",
        code="bad_weights",
    )


def read_header(path: Path) -> Header:
    """The checked header of the file at `path`. Raises EnvironmentFault when the file is damaged or not there."""
    try:
        with open_regular(path) as file:
            return read_header_from(file)
    except (OSError, ValueError) as problem:
        raise unreadable(path, problem) from problem


def read_header_from(file: BinaryIO | FileIO) -> Header:
    """The checked header of an open file, read from its start. Raises ValueError, saying what is wrong, or OSError."""
    found = os.fstat(file.fileno())
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is not a regular file")
    begin = file.read(LENGTH_BYTES)
    if begin == LFS_POINTER[:LENGTH_BYTES]:
        raise ValueError("it is a Git LFS pointer, not the file: run 'git lfs pull' in its folder")
    length = int.from_bytes(begin, "little")
    data_start = LENGTH_BYTES + length
    if found.st_size < LENGTH_BYTES or length > min(_MAX_HEADER_BYTES, found.st_size - LENGTH_BYTES):
        raise ValueError(f"its header should have {length} bytes; the file has {found.st_size}")
    # Decoded here: what a file begins with is no part of a header, a byte order mark included.
    entries = parse_json(file.read(length).decode("utf-8"), _no_duplicates)
    if not isinstance(entries, dict):
        raise ValueError("its header is not an object")
    metadata = entries.pop("__metadata__", None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is not an object of strings")
    tensors = {name: _stored_tensor(name, entry) for name, entry in entries.items()}
    _check_layout(tensors, found.st_size - data_start)
    return Header(tensors, metadata, data_start)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header has a key twice")
    for name in found:
        name.encode()  # half of a surrogate pair is no text: UnicodeEncodeError, which is a ValueError
    return found


def _stored_tensor(name: str, entry: Any) -> StoredTensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{_shown(name)} is not described by dtype, shape and data_offsets alone")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{_shown(name)} has an unknown dtype")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"{_shown(name)} has a shape that is not a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{_shown(name)} has data_offsets that are not a range")
    if math.prod(max(size, 1) for size in shape) >= _MAX_ELEMENTS:
        raise ValueError(f"{_shown(name)} has a shape of more elements than any file")
    if math.prod(shape) * _BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        raise ValueError(f"{_shown(name)} has another number of bytes than its shape and dtype need")
    return StoredTensor(dtype, tuple(shape), offsets[0], offsets[1])


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in values)


def _check_layout(tensors: dict[str, StoredTensor], data_bytes: int) -> None:
    """Tensors follow each other without gaps and overlaps, and fill the file."""
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != end:
            raise ValueError(f"{_shown(name)} does not begin where the tensor before it ends")
        end = tensor.end
    if end != data_bytes:
        raise ValueError(f"its tensors have {end} bytes; {data_bytes} follow the header")


def _shown(name: str) -> str:
    return repr(name) if len(name) <= 200 else repr(name[:200]) + "…"
