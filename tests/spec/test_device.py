"""detect_cpu on made-up machines: bare, in containers, with and without hyper-threads."""

from __future__ import annotations

import os
from pathlib import Path

from powerband.spec.hardware.device import detect_cpu

GIB = 2**30


def _machine(root: Path, *, threads_per_core: int = 2, cores: int = 4, **files: str) -> Path:
    """A root with /proc of a small server of 64 GiB, of which 48 are free; `files`: path with __ for / → text."""
    lines = []
    for cpu in range(cores * threads_per_core):
        lines.append(f"processor\t: {cpu}\nmodel name\t: Example 9000\nphysical id\t: 0\ncore id\t\t: {cpu % cores}")
        lines.append("flags\t\t: fpu avx2 fma avx512f avx512_vnni avx512_bf16 amx_tile\n")
    _write(root / "proc/cpuinfo", "\n".join(lines))
    _write(root / "proc/meminfo", f"MemTotal: {64 * 2**20} kB\nMemFree: 1 kB\nMemAvailable: {48 * 2**20} kB\n")
    for path, text in files.items():
        _write(root / path.replace("__", "/"), text)
    return root


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_bare_machine(tmp_path: Path) -> None:
    device = detect_cpu(_machine(tmp_path), range(8))
    assert (device.name, device.kind, device.cores) == ("Example 9000", "cpu", 4)
    assert (device.memory_bytes, device.available_memory_bytes) == (64 * GIB, 48 * GIB)
    assert device.features == ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")


def test_cores_are_those_the_process_may_use(tmp_path: Path) -> None:
    root = _machine(tmp_path)
    assert detect_cpu(root, {0, 4}).cores == 1  # two threads of one core
    assert detect_cpu(root, {0, 1, 2}).cores == 3


def test_limits_of_a_container_with_cgroups_2(tmp_path: Path) -> None:
    root = _machine(tmp_path)
    group = root / "sys/fs/cgroup/pod/app"
    _write(root / "proc/self/cgroup", "0::/pod/app\n")
    _write(group / "memory.max", "max\n")
    _write(group.parent / "memory.max", f"{8 * GIB}\n")
    _write(group.parent / "memory.current", f"{6 * GIB}\n")
    _write(group.parent / "memory.stat", f"anon 1\ninactive_file {3 * GIB}\n")
    _write(group / "cpu.max", "150000 100000\n")
    device = detect_cpu(root, range(8))
    assert (device.memory_bytes, device.available_memory_bytes, device.cores) == (8 * GIB, 5 * GIB, 2)


def test_limits_of_a_container_with_cgroups_1_whose_path_is_the_hosts(tmp_path: Path) -> None:
    root = _machine(tmp_path)
    _write(root / "proc/self/cgroup", "4:memory:/docker/0123\n3:cpu,cpuacct:/docker/0123\n0::/\n")
    _write(root / "sys/fs/cgroup/memory/memory.limit_in_bytes", f"{4 * GIB}\n")
    _write(root / "sys/fs/cgroup/memory/memory.usage_in_bytes", f"{GIB}\n")
    _write(root / "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n")
    _write(root / "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    device = detect_cpu(root, range(8))
    assert (device.memory_bytes, device.available_memory_bytes, device.cores) == (4 * GIB, 3 * GIB, 4)


def test_a_limit_above_the_machines_memory_is_no_limit(tmp_path: Path) -> None:
    root = _machine(tmp_path)
    _write(root / "proc/self/cgroup", "4:memory:/\n")
    _write(root / "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    device = detect_cpu(root, range(8))
    assert (device.memory_bytes, device.available_memory_bytes) == (64 * GIB, 48 * GIB)


def test_a_system_without_proc_still_has_an_answer(tmp_path: Path) -> None:
    device = detect_cpu(tmp_path, range(3))
    assert device.cores == 3
    assert device.memory_bytes > 0


def test_this_machine() -> None:
    device = detect_cpu()
    assert 1 <= device.cores <= (os.cpu_count() or 1)
    assert 0 < device.available_memory_bytes <= device.memory_bytes
