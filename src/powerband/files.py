"""Files that are written as a whole or not at all, and folders that are this user's from the start."""

from __future__ import annotations

import os
from pathlib import Path


def set_aside(path: Path) -> Path:
    """Rename a damaged file, so that it can be looked at and is not read again. Raises OSError."""
    kept = path.with_name(f"{path.name}.damaged")
    os.replace(path, kept)
    return kept


def write_atomically(path: Path, data: bytes, *, durable: bool = True, private: bool = False) -> None:
    """Raises OSError; then what was there before still is, and nothing else.

    durable: also where the machine loses power. private: mode 0600, whatever the umask.
    """
    made = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        descriptor = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600 if private else 0o666)
        with open(descriptor, "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        made.replace(path)
    except BaseException:
        made.unlink(missing_ok=True)
        raise
    if durable:
        _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    """So that the new name is on disk, too."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_private_folder(path: Path) -> None:
    """With all that is missing above it, each of mode 0700 from the moment it is there. Raises OSError.

    `Path.mkdir` gives its mode to the last folder only, and the umask's to those above. What is there stays as it is.
    """
    for folder in (*reversed(path.parents), path):
        if not folder.is_dir():
            folder.mkdir(mode=0o700, exist_ok=True)
