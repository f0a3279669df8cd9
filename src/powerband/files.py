"""Files that are written as a whole or not at all, that are read only if they are regular, and private folders."""

from __future__ import annotations

import errno
import os
import stat
from io import FileIO
from pathlib import Path


def open_regular(path: Path) -> FileIO:
    """Open a file for reading, without a buffer. Raises OSError.

    Anything but a regular file is refused at once: opening a FIFO waits for its writer, and a device may have no end.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        return FileIO(descriptor)
    except BaseException:
        os.close(descriptor)
        raise


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
