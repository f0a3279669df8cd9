"""All tensors of a checkpoint under the names that our families know, whichever files and prefixes they have."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch

from powerband.engine.model_loader.safetensors_file import SafetensorsFile
from powerband.errors import UsageError
from powerband.spec.checkpoint.files import EMBEDDING, HEAD, tensor_names


class StoredTensors:
    """A checkpoint's open files. Raises EnvironmentFault for files that are damaged, UsageError for tensors held twice.

    tied: one tensor is embedding and head, and the file may call it either.
    """

    def __init__(self, files: Sequence[Path], *, tied: bool = False) -> None:
        self._files = ExitStack()
        self._where: dict[str, tuple[SafetensorsFile, str]] = {}
        holder: dict[str, SafetensorsFile] = {}
        try:
            for path in files:
                file = self._files.enter_context(SafetensorsFile(path))
                for name in file.names():
                    if name in holder:
                        raise UsageError(
                            f"{name} is in {holder[name].path} and in {path}.",
                            hint="Remove the files that belong to another checkpoint, or add the index.",
                            code="bad_weights",
                        )
                    holder[name] = file
            names = tensor_names(holder)
        except BaseException:
            self._files.close()
            raise
        self.outside = names.outside  # of other parts than the text model
        self._where = {ours: (holder[stored], stored) for ours, stored in names.stored_as.items()}
        if tied and EMBEDDING not in self._where and HEAD in self._where:
            self._where[EMBEDDING] = self._where.pop(HEAD)

    def __enter__(self) -> StoredTensors:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._files.close()

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def names(self) -> Collection[str]:
        return self._where.keys()

    def described(self, name: str) -> str:
        """The tensor as its file calls it, and the file."""
        file, stored = self._where[name]
        return f"{stored} (in {file.path.name})"

    def shape(self, name: str) -> list[int]:
        file, stored = self._where[name]
        return file.shape(stored)

    def dtype(self, name: str) -> torch.dtype:
        """Raises UsageError for a type that torch or this engine lacks."""
        file, stored = self._where[name]
        return file.dtype(stored)

    def read(self, name: str, out: torch.Tensor | None = None) -> torch.Tensor:
        """The tensor; in `out` if that is contiguous and of its shape and type. Raises UsageError."""
        file, stored = self._where[name]
        return file.read(stored, out)
