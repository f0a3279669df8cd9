"""Builds the C++ kernels for this machine's CPU, once, and loads them as operators `torch.ops.powerband.*`.

The sources (csrc/) use torch's stable ABI. They are compiled for the processor's *tier* by the compiler that the system
has, into a cache directory named after everything that the result depends on. Without a compiler nothing breaks: plain
torch computes instead, and `powerband doctor` reports it.

    tier      needs
    amx       avx512 + bf16 and VNNI + AMX tiles for bf16 and int8
    avx512    AVX-512 F, BW, VL, DQ (bf16 and VNNI dot products where present)
    avx2      AVX2, FMA, F16C
    plain     any processor
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO

from powerband.errors import EnvironmentFault, UsageError
from powerband.extras import require
from powerband.folders import WRITABLE_CACHE, cache_directory
from powerband.spec.hardware.device import detect_cpu

TIERS = ("amx", "avx512", "avx2", "plain")
FAST_TIERS = TIERS[:-1]  # faster than plain torch
TIER_VARIABLE = "POWERBAND_KERNEL_TIER"  # a tier, or "off"; for tests and comparisons
SANITIZE_VARIABLE = "POWERBAND_KERNEL_SANITIZE"  # "1": with address and undefined-behaviour sanitizers
SOURCES = Path(__file__).parent / "csrc"
REPORT_EVERY_S = 10.0  # while they are compiled
OLDEST_TORCH = 0x020B000000000000  # 2.11: the stable ABI that the sources are written against

_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq")
_AMX = ("avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8")
# CPU feature (as in /proc/cpuinfo) → compiler flag.
_FLAGS = {
    "avx2": "-mavx2",
    "fma": "-mfma",
    "f16c": "-mf16c",
    "avx_vnni": "-mavxvnni",
    "avx512f": "-mavx512f",
    "avx512bw": "-mavx512bw",
    "avx512vl": "-mavx512vl",
    "avx512dq": "-mavx512dq",
    "avx512_vnni": "-mavx512vnni",
    "avx512_bf16": "-mavx512bf16",
    "amx_tile": "-mamx-tile",
    "amx_bf16": "-mamx-bf16",
    "amx_int8": "-mamx-int8",
}
_BUILD_ERRORS = (EnvironmentFault, UsageError, OSError, subprocess.SubprocessError)
_COMMON_FLAGS = ("-std=c++20", "-fPIC", "-w", "-fno-math-errno", "-fvisibility=hidden")


Progress = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class Status:
    """The state of the kernels. `tier` is None when plain torch computes; `reason` explains why, or describes them.

    remedy: what would help, where that is known.
    """

    tier: str | None
    reason: str
    remedy: str = ""


@functools.cache
def load() -> Status:
    """Build the library where that has not been done, and load it into this process. Never raises: see `Status`.

    The first build takes about ten seconds of two cores; after that loading takes milliseconds.
    """
    asked = os.environ.get(TIER_VARIABLE, "")
    if asked == "off":
        return Status(None, f"{TIER_VARIABLE} is 'off'", f"Unset {TIER_VARIABLE}.")
    import torch

    try:
        tier = choose_tier(asked, detect_cpu().features)
        torch.ops.load_library(str(build(tier)))  # type: ignore[no-untyped-call]  # torch's own is untyped
    except (EnvironmentFault, UsageError) as problem:
        return Status(None, problem.message, problem.hint)
    except (OSError, subprocess.SubprocessError) as problem:
        return Status(None, str(problem))
    return Status(tier, f"compiled for this processor ({tier})")


def load_with_progress(progress: Progress) -> Status:
    """As `load`. progress: called with the fraction that is compiled, if something is."""
    with suppress(*_BUILD_ERRORS):  # `load` reports it
        compile_own(progress)
    return load()


def compile_own(progress: Progress | None = None) -> Path:
    """Build the library that `load` would load, without loading it. Raises EnvironmentFault and UsageError."""
    return build(own_tier(), progress)


def own_tier() -> str:
    """The tier that `load` would load. Raises UsageError if it was named and cannot run here."""
    return choose_tier(os.environ.get(TIER_VARIABLE, ""), detect_cpu().features)


def choose_tier(asked: str, features: Collection[str]) -> str:
    """The best tier for a processor with these features, or the one `asked` for. Raises UsageError if it cannot run."""
    runs = [tier for tier in TIERS if _required(tier) <= set(features)]
    if not asked:
        return runs[0]
    if asked not in runs:
        raise UsageError(
            f"{TIER_VARIABLE} is {asked!r}; this processor can run {', '.join(runs)}.", hint="Leave it out."
        )
    return asked


def build(tier: str, progress: Progress | None = None) -> Path:
    """The library of this tier, compiled if need be, which stderr shows. Raises EnvironmentFault where that is
    impossible. progress: called with the fraction that is compiled.
    """
    compiler, flags, library = _planned(tier)
    if library.exists():
        return library
    with _lock_file(library.parent) as lock:
        _wait_for(lock)
        if not library.exists():
            _compile(compiler, flags, library.parent, library, progress or (lambda _fraction: None))
    return library


def _lock_file(folder: Path) -> IO[str]:
    """Raises EnvironmentFault if nothing can be written into the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return (folder / "lock").open("w")
    except OSError as problem:
        raise EnvironmentFault(
            f"The CPU kernels cannot be compiled into {folder}: {problem.strerror}.", hint=WRITABLE_CACHE
        ) from problem


def is_compiled() -> bool:
    """Whether `load` would compile nothing. Raises EnvironmentFault where it could not, and UsageError."""
    _, _, library = _planned(own_tier())
    if library.exists():
        return True
    _lock_file(library.parent).close()
    return False


def _planned(tier: str) -> tuple[str, tuple[str, ...], Path]:
    """(compiler, flags, library) of a tier. Raises EnvironmentFault where it cannot be compiled."""
    require("torch", "Compiling the CPU kernels")
    compiler = find_compiler()
    if compiler is None:
        raise EnvironmentFault(
            "No C++ compiler was found, so the CPU kernels cannot be built.",
            hint="Install one (Debian: apt install g++).",
        )
    flags = _flags(tier, detect_cpu().features)
    return compiler, flags, cache_directory() / "kernels" / _key(compiler, flags) / "powerband_kernels.so"


def find_compiler() -> str | None:
    """$CXX, or the first C++ compiler on the path."""
    named = [os.environ["CXX"]] if os.environ.get("CXX") else []
    return next((path for name in (*named, "g++", "clang++", "c++") if (path := shutil.which(name))), None)


def _required(tier: str) -> set[str]:
    needs = {"plain": (), "avx2": ("avx2", "fma", "f16c")}
    needs["avx512"] = (*needs["avx2"], *_AVX512)
    needs["amx"] = (*needs["avx512"], *_AMX)
    return set(needs[tier])


def _flags(tier: str, features: Collection[str]) -> tuple[str, ...]:
    wanted = {
        "plain": (),
        "avx2": ("avx2", "fma", "f16c", "avx_vnni"),
        "avx512": ("avx2", "fma", "f16c", *_AVX512, "avx512_vnni", "avx512_bf16"),
        "amx": ("avx2", "fma", "f16c", *_AVX512, *_AMX),
    }[tier]
    chosen = [_FLAGS[feature] for feature in wanted if feature in features]
    if tier in ("avx512", "amx"):
        chosen.append("-mprefer-vector-width=512")
    if os.environ.get(SANITIZE_VARIABLE) == "1":
        checks = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")
        return (*_COMMON_FLAGS, "-O1", "-g1", *checks, *chosen)
    return (*_COMMON_FLAGS, "-O3", *chosen)


def _key(compiler: str, flags: tuple[str, ...]) -> str:
    """A name for everything that the library depends on."""
    return _digest(compiler, flags, *sorted(SOURCES.iterdir()))


def _digest(compiler: str, flags: tuple[str, ...], *sources: Path) -> str:
    digest = hashlib.sha256(repr((flags, version("torch"), _identity(compiler))).encode())
    for path in sources:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:20]


@functools.cache
def _identity(compiler: str) -> str:
    shown = subprocess.run([compiler, "-dumpfullversion", "-dumpmachine"], capture_output=True, text=True, check=False)
    return f"{os.path.realpath(compiler)} {shown.stdout}"


def _wait_for(lock: IO[str]) -> None:
    """Of those that start at the same time, one compiles, and the others wait for it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _show("Waiting for another process, which is compiling the CPU kernels.")
        fcntl.flock(lock, fcntl.LOCK_EX)


def _show(text: str) -> None:
    """On stderr, with or without a terminal: a first start would otherwise be silent for up to a minute."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _follow(compiling: Sequence[Future[str]], progress: Progress) -> list[str]:
    """The results, in order, when all are there."""
    _show("Compiling the CPU kernels for this processor. This happens once, and takes up to a minute.")
    began_s = shown_s = time.monotonic()
    left = set(compiling)
    while left:
        _, left = wait(left, timeout=REPORT_EVERY_S, return_when=FIRST_COMPLETED)
        progress(1 - len(left) / len(compiling))
        if left and time.monotonic() - shown_s >= REPORT_EVERY_S:
            shown_s = time.monotonic()
            done = len(compiling) - len(left)
            _show(f"Compiling the CPU kernels: {done} of {len(compiling)} files, {shown_s - began_s:.0f} s.")
    return [one.result() for one in compiling]


def _compile(compiler: str, flags: tuple[str, ...], folder: Path, library: Path, progress: Progress) -> None:
    """Every source by itself, as many at a time as there are cores, then all together.

    Object files are kept too: a change to one source costs the compilation of that source.
    """
    root = Path(str(require("torch", "Compiling the CPU kernels").origin)).parent
    include = ["-I", str(root / "include"), f"-DTORCH_TARGET_VERSION={OLDEST_TORCH:#018x}"]
    kept = folder.parent / "objects"
    kept.mkdir(exist_ok=True, mode=0o700)
    headers = sorted(SOURCES.glob("*.h"))
    with tempfile.TemporaryDirectory(dir=folder) as scratch:

        def compiled(source: Path) -> str:
            target = kept / f"{source.stem}-{_digest(compiler, flags, source, *headers)}.o"
            if not target.exists():
                made = Path(scratch) / target.name
                _run([compiler, *flags, *include, "-c", str(source), "-o", str(made)])
                made.replace(target)
            return str(target)

        with ThreadPoolExecutor(detect_cpu().cores) as pool:
            objects = _follow([pool.submit(compiled, source) for source in sorted(SOURCES.glob("*.cpp"))], progress)
        made = Path(scratch) / library.name
        _run([compiler, *flags, "-shared", *objects, "-o", str(made), "-L", str(root / "lib"), "-ltorch_cpu", "-lc10"])
        made.replace(library)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EnvironmentFault(
            f"{command[0]} could not build the CPU kernels: {done.stderr.strip()[-800:]}",
            hint="Use a compiler that knows C++20 (g++ 11 or newer), named in CXX.",
        )
