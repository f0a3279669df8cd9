"""Whether this machine has a GPU, found without loading torch where it has none."""

from __future__ import annotations

from pathlib import Path

from powerband.spec.settings import EngineSettings

GPU_NODES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


def compute_device(settings: EngineSettings) -> str:
    """'cpu' or 'cuda': where an engine with these settings would run. Loads torch only where there is a GPU."""
    if settings.device != "auto":
        return settings.device
    if not has_gpu_nodes():
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def has_gpu_nodes() -> bool:
    """Whether the system shows a GPU's device file (NVIDIA, AMD, or either under WSL)."""
    return any(Path(node).exists() for node in GPU_NODES)
