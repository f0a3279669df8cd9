"""Packed weights kept for the next start: one safetensors file per checkpoint and precision, in the cache directory.

A quantized model is a quarter or half of its checkpoint, and nothing is left to compute: the next start reads these
bytes into their place. Norms, embeddings and whatever else is not packed still come from the checkpoint.

The name of a file is made of everything that its content depends on, the checkpoint's content included, so that a file
is right or never looked at, also beside a checkpoint that was made to be mistaken for another. It appears complete
under that name, or not at all, and what is read from it is checked.
Whatever goes wrong here is a warning: the checkpoint is still there.

    <engine>-<content>.safetensors   packed weights; content: SHA-256 of all tensors of the checkpoint
    <files>.known                    a link to them; files: the checkpoint's inodes, sizes, times and samples

Reading a whole checkpoint to find its name would cost what the cache saves. So a link records which content these very
files had, and a checkpoint is only read for its name when there is no link but there is packed content to be found.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from powerband.engine.huge_pages import huge_empty
from powerband.engine.linear.base import LinearMethod, LinearModule
from powerband.engine.linear.int4 import Int4LinearMethod
from powerband.engine.linear.int8 import Int8LinearMethod
from powerband.engine.model_loader.linear_methods import LinearMethodSelector, parts_of
from powerband.engine.model_loader.safetensors_file import SafetensorsFile, checksums, stored_name
from powerband.errors import PowerbandError
from powerband.files import open_regular
from powerband.folders import cache_directory
from powerband.spec.checkpoint.files import weight_files
from powerband.spec.checkpoint.safetensors import LENGTH_BYTES, read_header_from

logger = logging.getLogger(__name__)

# Raise this when the packed form of any product changes.
LAYOUT = 3
LIMIT_BYTES = 64 << 30  # of all files together; the least recently used go first
KEPT_FREE_BYTES = 4 << 30  # of the disk, for others
_STALE_S = 3600  # an unfinished file this old belongs to a process that ended
_PIECE_BYTES = 8 << 20
_SAMPLE_BYTES = 4096  # of every tensor, from its middle
_SETTLED_S = 2  # files changed later than this before a look at them may change again without another time
_ALIGNMENT = 64
_KINDS: dict[str, type[Int4LinearMethod | Int8LinearMethod]] = {"int4": Int4LinearMethod, "int8": Int8LinearMethod}

# Products of each part of a model that are known by the part's name.
Found = dict[str, list[LinearMethod]]


def folder() -> Path:
    """Where the files are."""
    return cache_directory() / "weights"


class WeightCache:
    """The file of one checkpoint, as one engine would hold it."""

    def __init__(self, selector: LinearMethodSelector, checkpoint: Path) -> None:
        """Raises as `weight_files` does, EnvironmentFault for damaged files and OSError for what cannot be read."""
        self._files = weight_files(checkpoint)
        engine = repr((LAYOUT, selector.model.spec, selector.held, selector.kernels))
        self._engine = hashlib.sha256(engine.encode()).hexdigest()[:16]
        self._identity = _identity(self._files)
        self._content: str | None = None  # read when it is needed
        self._link = folder() / f"{self._name(self._identity)}.known"
        self._is_settled = all(time.time() - path.stat().st_ctime > _SETTLED_S for path in self._files)
        self._ending = threading.Event()
        self._writer: threading.Thread | None = None

    def _name(self, digest: str) -> str:
        return f"{self._engine}-{digest}"

    def read(self, selector: LinearMethodSelector) -> Found:
        """All products that were kept, each in memory of its own. Empty: there are none, or they are damaged."""
        path = self._find()
        if path is None:
            return {}
        try:
            with SafetensorsFile(path) as file:
                found = _read(file, selector)
            os.utime(path)  # used now: others are deleted before
        except (PowerbandError, OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as problem:
            logger.warning("The weight cache %s is damaged and will be written again: %s", path, problem)
            with contextlib.suppress(OSError):
                path.unlink()
            return {}
        return found

    def _find(self) -> Path | None:
        """The packed weights of this checkpoint, by their link or else by its content."""
        with contextlib.suppress(OSError):
            if self._is_settled and (path := folder() / os.readlink(self._link)).exists():
                return path
        if not any(folder().glob(f"{self._engine}-*.safetensors")):
            return None
        path = self._path_of_content()
        if not path.exists():
            return None
        self._remember(path)
        return path

    def _path_of_content(self) -> Path:
        if self._content is None:
            self._content = _content_digest(self._files)
        return folder() / f"{self._name(self._content)}.safetensors"

    def _remember(self, path: Path) -> None:
        """Link these files, as they are now, to what was packed of them."""
        if self._is_settled:
            with contextlib.suppress(OSError):
                self._link.unlink(missing_ok=True)
                self._link.symlink_to(path.name)

    def write(self, selector: LinearMethodSelector) -> None:
        """Keep the products for the next start, in a thread of its own: `close` waits for it."""
        named = {name: kept for name, kept in _named(selector).items() if _can_keep(kept)}
        if named and not self._link.exists():
            self._writer = threading.Thread(target=self._write, args=(named,), name="weight-cache", daemon=True)
            self._writer.start()

    def wait(self) -> None:
        """Until everything is written."""
        if self._writer is not None:
            self._writer.join()

    def close(self) -> None:
        """End the writing, finished or not."""
        self._ending.set()
        self.wait()

    def _write(self, named: Found) -> None:
        try:
            path = self._path_of_content()
            if _identity(self._files) != self._identity:
                return  # they changed while they were loaded: what was packed is unknown
            if not path.exists() and not self._write_file(path, named):
                return
            self._remember(path)
        except (OSError, PowerbandError) as problem:
            logger.warning("The weight cache could not be written, so the next start quantizes again: %s", problem)

    def _write_file(self, path: Path, named: Found) -> bool:
        """False if there is no room, or if the engine ended before it was done."""
        tensors, kinds = _tensors(named)
        header, size = _header(tensors, kinds)
        if not _make_room(size):
            return False
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            try:
                complete = self._write_to(file.fileno(), header, tensors)
                if complete:
                    os.fsync(file.fileno())  # the name must not be there before the content
                    os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
            if not complete:
                os.unlink(file.name)
        return complete

    def _write_to(self, fd: int, header: bytes, tensors: Mapping[str, torch.Tensor]) -> bool:
        """False if it was cancelled before it was done."""
        for content in (memoryview(header), *map(_content, tensors.values())):
            done = 0
            while done < len(content):
                if self._ending.is_set():
                    return False
                done += os.write(fd, content[done : done + _PIECE_BYTES])
        return True


def kept_files() -> list[Path]:
    """Every complete file, the least recently used first."""
    with contextlib.suppress(OSError):
        return sorted(folder().glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
    return []


# ---- names


def _identity(files: list[Path]) -> str:
    """Identifies these very files: by inode, size and times, which no copy shares, and by a sample of every tensor,
    for file systems that give two images the same inodes and times.
    """
    digest = hashlib.sha256()
    for path in files:
        found = path.stat()
        digest.update(repr((path.name, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)).encode())
        with open_regular(path) as file:
            header = read_header_from(file)
            digest.update(repr(header).encode())
            for tensor in header.tensors.values():
                middle = header.data_start + (tensor.start + tensor.end) // 2
                digest.update(os.pread(file.fileno(), min(_SAMPLE_BYTES, tensor.end - tensor.start), middle))
    return digest.hexdigest()[:32]


def _content_digest(files: list[Path]) -> str:
    """SHA-256 over every tensor's name, type, shape and bytes. It reads all files."""
    digest = hashlib.sha256()
    for path in files:
        with SafetensorsFile(path) as file:
            for name in file.names():
                described = (name, stored_name(file.dtype(name)), file.shape(name), file.digests(name))
                digest.update(repr(described).encode())
    return digest.hexdigest()


def _named(selector: LinearMethodSelector) -> Found:
    names = {id(part): name for name, part in parts_of(selector.model)}
    return {names[id(part)]: list(kept) for part, kept in selector.installed}


def _can_keep(kept: Iterable[LinearMethod]) -> bool:
    return all(isinstance(method, tuple(_KINDS.values())) for method in kept)


# ---- from and to files


def _read(file: SafetensorsFile, selector: LinearMethodSelector) -> Found:
    """Raises ValueError for what does not belong to the model, and as SafetensorsFile does."""
    entries = {name: _entry(file, name) for name in file.names()}
    if file.metadata.get("digest") != _digest(entries, file.metadata["kinds"], file.metadata["checksums"]):
        raise ValueError("its header was changed")
    kinds: dict[str, str] = json.loads(file.metadata["kinds"])
    expected: dict[str, list[int]] = json.loads(file.metadata["checksums"])
    parts = dict(parts_of(selector.model))
    stored: dict[str, dict[str, torch.Tensor]] = {name: {} for name in kinds}
    for name in file.names():
        owner, _, tensor = name.rpartition("/")
        place = huge_empty(tuple(file.shape(name)), file.dtype(name))
        stored[owner][tensor] = file.read(name, place)
        if checksums(stored[owner][tensor]) != expected[name]:
            raise ValueError(f"the bytes of {name} were changed")
    found: Found = {}
    for owner, kind in kinds.items():
        part, _, index = owner.rpartition("/")
        method = _KINDS[kind].from_tensors(stored[owner])
        _check_size(method, parts[part], int(index), part)
        found.setdefault(part, []).append(method)
    for name, kept in found.items():
        if len(kept) != len(parts[name].matrices()):
            raise ValueError(f"{name} is not complete")
    return found


def _check_size(method: Int4LinearMethod | Int8LinearMethod, part: LinearModule, index: int, name: str) -> None:
    if (method.out_features, method.in_features) != tuple(part.matrices()[index].weight.shape):
        raise ValueError(f"{name} has another size")


def _tensors(named: Found) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors by their names in the file, and the kind of each product."""
    tensors: dict[str, torch.Tensor] = {}
    kinds: dict[str, str] = {}
    for part, kept in named.items():
        for index, method in enumerate(kept):
            for kind, form in _KINDS.items():
                if isinstance(method, form):
                    kinds[f"{part}/{index}"] = kind
                    tensors |= {f"{part}/{index}/{name}": tensor for name, tensor in method.tensors().items()}
    # Large elements first, so that each tensor begins at a multiple of its element's size.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    return {name: tensor.contiguous() for name, tensor in ordered}, kinds


def _header(tensors: Mapping[str, torch.Tensor], kinds: Mapping[str, str]) -> tuple[bytes, int]:
    """What stands before the data (https://huggingface.co/docs/safetensors), and the size of the whole file."""
    entries: dict[str, object] = {}
    end = 0
    for name, tensor in tensors.items():
        entry = {"dtype": stored_name(tensor.dtype), "shape": list(tensor.shape)}
        entries[name] = {**entry, "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    kinds_json, sums = json.dumps(kinds), json.dumps({name: checksums(tensor) for name, tensor in tensors.items()})
    metadata = {"digest": _digest(entries, kinds_json, sums), "kinds": kinds_json, "checksums": sums}
    text = json.dumps({"__metadata__": metadata, **entries}).encode()
    text += b" " * (-(len(text) + LENGTH_BYTES) % _ALIGNMENT)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text, LENGTH_BYTES + len(text) + end


def _entry(file: SafetensorsFile, name: str) -> dict[str, object]:
    return {"dtype": stored_name(file.dtype(name)), "shape": file.shape(name), "data_offsets": list(file.offsets(name))}


def _digest(entries: Mapping[str, object], kinds: str, checksums: str) -> str:
    return hashlib.sha256(json.dumps([entries, kinds, checksums], sort_keys=True).encode()).hexdigest()


def _content(tensor: torch.Tensor) -> memoryview:
    if not tensor.numel():
        return memoryview(b"")
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)


# ---- room


def _make_room(size: int) -> bool:
    """Delete what was used least recently until `size` bytes more are within bounds. False: they never will be."""
    place = folder()
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    for path in place.glob("*.part"):
        if time.time() - path.stat().st_mtime > _STALE_S:
            path.unlink(missing_ok=True)
    for link in place.glob("*.known"):
        if not link.exists():  # what it led to is gone
            link.unlink(missing_ok=True)
    kept = kept_files()
    total = sum(path.stat().st_size for path in kept)
    while kept and (total + size > LIMIT_BYTES or shutil.disk_usage(place).free - size < KEPT_FREE_BYTES):
        oldest = kept.pop(0)
        total -= oldest.stat().st_size
        oldest.unlink(missing_ok=True)
    fits = total + size <= LIMIT_BYTES and shutil.disk_usage(place).free - size >= KEPT_FREE_BYTES
    if not fits:
        logger.warning("The weight cache needs %.1f GiB in %s, which is too full.", size / (1 << 30), place)
    return fits
