"""Tensors of a safetensors file, read one at a time into memory that the caller owns.

The library maps whole files into memory; while a model loads, that would count every page of the checkpoint beside the
model. Here the library checks the header, and the bytes are read from the file directly, into their place if possible.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open

from powerband.engine.checkpoint import unreadable
from powerband.errors import UsageError

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
_LENGTH_BYTES = 8  # of the header's length, which stands before it


class SafetensorsFile:
    """An open file. Raises EnvironmentFault when it is damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt", device="cpu"):
                pass  # opening checks the header: sizes, offsets, overlaps
            self._file = path.open("rb", buffering=0)
            length = int.from_bytes(self._file.read(_LENGTH_BYTES), "little")
            self._entries = json.loads(self._file.read(length))
        except (SafetensorError, OSError, ValueError, OverflowError, MemoryError, RecursionError) as problem:
            raise unreadable(path, problem) from problem
        self.metadata: dict[str, str] = self._entries.pop("__metadata__", None) or {}
        self._data_start = _LENGTH_BYTES + length

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._file.close()

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> list[int]:
        shape: list[int] = self._entries[name]["shape"]
        return shape

    def dtype(self, name: str) -> torch.dtype:
        """Raises UsageError for a type that torch or this engine lacks."""
        stored = self._entries[name]["dtype"]
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
        start, end = self._entries[name]["data_offsets"]
        view = memoryview(tensor.detach().view(-1).view(torch.uint8).numpy().data) if end > start else memoryview(b"")
        done = 0
        try:
            while done < len(view):
                count = os.preadv(self._file.fileno(), [view[done:]], self._data_start + start + done)
                if not count:
                    raise OSError("the file ends before it")
                done += count
        except OSError as problem:
            raise UsageError(f"{name} cannot be read: {problem}", code="bad_weights") from problem
        return tensor
