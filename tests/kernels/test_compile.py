"""The kernels compile for GPUs of several kinds with no GPU here: the interpreter accepts more than the compiler."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("target", ["cuda 80 32", "cuda 90 32", "hip gfx942 64"])
def test_every_launch_compiles_and_fits(target, tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(Path(__file__).parent / "compile_kernels.py"), *target.split()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = {line.split()[0] for line in done.stdout.splitlines()}
    assert compiled == {
        "stage_decodes_kernel",
        "rotary_store_kernel",
        "chunk_kernel",
        "decode_kernel",
        "combine_kernel",
        "rms_norm_kernel",
        "gated_kernel",
        "grouped_matmul_kernel",
    }
