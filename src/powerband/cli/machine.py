"""Whether this machine has a GPU, found without loading torch where it has none."""

from __future__ import annotations

from powerband.extras import is_installed
from powerband.spec.hardware.device import has_gpu_nodes
from powerband.spec.settings import EngineSettings


def compute_device(settings: EngineSettings) -> str:
    """'cpu' or 'cuda': where an engine with these settings would run. Loads torch only where there is a GPU."""
    if settings.device != "auto":
        return settings.device
    if not has_gpu_nodes():
        return "cpu"
    if not is_installed("torch"):
        return "cuda"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
