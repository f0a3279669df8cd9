"""Tensors of a safetensors file, read one at a time into memory that the caller owns.

The safetensors library maps whole files into memory; while a model loads, that would count every page of the checkpoint
beside the model. Here the bytes are read from the file directly, into their place if possible.
"""

from __future__ import annotations

import functools
import hashlib
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import torch

from powerband.errors import UsageError
from powerband.files import open_regular
from powerband.spec.checkpoint.safetensors import read_header_from, unreadable
from powerband.spec.hardware.device import detect_cpu

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_PIECE_BYTES = 4 << 20  # large tensors are read in such pieces by several threads: one copies more slowly than memory
_AHEAD_BYTES = 64 << 20  # the system is asked to fetch so much from the disk while what was read is used
_MAX_READERS = 4


class SafetensorsFile:
    """An open file. Raises EnvironmentFault when it is damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = open_regular(path)
        except OSError as problem:
            raise unreadable(path, problem) from problem
        try:
            header = read_header_from(self._file)
        except (OSError, ValueError) as problem:
            self._file.close()
            raise unreadable(path, problem) from problem
        self.metadata = header.metadata
        self._entries = header.tensors
        self._data_start = header.data_start

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._file.close()

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> list[int]:
        return list(self._entries[name].shape)

    def offsets(self, name: str) -> tuple[int, int]:
        """Where its bytes begin and end, from the start of the data."""
        entry = self._entries[name]
        return entry.start, entry.end

    def dtype(self, name: str) -> torch.dtype:
        """Raises UsageError for a type that torch or this engine lacks."""
        stored = self._entries[name].dtype
        if stored not in _DTYPES:
            raise UsageError(
                f"{name} is stored as {stored}, which is not supported.",
                hint="Use the model's version in 16 bits.",
                code="bad_weights",
            )
        return _DTYPES[stored]

    def read(self, name: str, out: torch.Tensor | None = None) -> torch.Tensor:
        """The tensor; in `out` if that is contiguous and of its shape and type. Raises UsageError."""
        dtype, shape = self.dtype(name), self.shape(name)
        fits = out is not None and out.is_contiguous() and out.dtype is dtype and list(out.shape) == shape
        tensor = out if out is not None and fits and out.device.type == "cpu" else torch.empty(shape, dtype=dtype)
        start, end = self.offsets(name)
        view = memoryview(tensor.detach().view(-1).view(torch.uint8).numpy().data) if end > start else memoryview(b"")
        first = self._data_start + start
        pieces = range(0, len(view), _PIECE_BYTES)
        each = _readers().map if len(pieces) > 1 else map
        try:
            os.posix_fadvise(self._file.fileno(), self._data_start + end, _AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
            for _ in each(lambda at: self._read_into(view[at : at + _PIECE_BYTES], first + at), pieces):
                pass
        except OSError as problem:
            raise UsageError(f"{name} cannot be read: {problem}", code="bad_weights") from problem
        return tensor

    def digests(self, name: str) -> list[str]:
        """SHA-256 of each piece of the tensor's bytes, without holding it. Raises UsageError."""
        start, end = self.offsets(name)

        def of_piece(at: int) -> str:
            piece = bytearray(min(_PIECE_BYTES, end - at))
            self._read_into(memoryview(piece), self._data_start + at)
            return hashlib.sha256(piece).hexdigest()

        try:
            return list(_readers().map(of_piece, range(start, end, _PIECE_BYTES)))
        except OSError as problem:
            raise UsageError(f"{name} cannot be read: {problem}", code="bad_weights") from problem

    def _read_into(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            count = os.preadv(self._file.fileno(), [view[done:]], offset + done)
            if not count:
                raise OSError("the file ends before it")
            done += count


def checksums(tensor: torch.Tensor) -> list[int]:
    """CRC-32 of each piece of a contiguous tensor's bytes: finds damage, not what was made to have the same CRC."""
    if not tensor.numel():
        return []
    view = memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)
    return list(_readers().map(lambda at: zlib.crc32(view[at : at + _PIECE_BYTES]), range(0, len(view), _PIECE_BYTES)))


def stored_name(dtype: torch.dtype) -> str:
    """What files call a type."""
    return next(name for name, known in _DTYPES.items() if known is dtype)


@functools.cache
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(_MAX_READERS, detect_cpu().cores), thread_name_prefix="powerband-read")
