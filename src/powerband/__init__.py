"""Powerband: serve open-weight LLMs in the range where the hardware does its best work.

from powerband import LLM, SamplingParams
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from powerband.core.params import PoolingParams, SamplingParams
    from powerband.core.structured_outputs import StructuredOutputsParams
    from powerband.engine.offline.adapters import LoRARequest
    from powerband.engine.offline.llm import LLM

    __version__: str

__all__ = ["LLM", "LoRARequest", "PoolingParams", "SamplingParams", "StructuredOutputsParams", "__version__"]


def __getattr__(name: str) -> Any:
    """Load on first use, so that importing the package costs nothing."""
    if name == "LLM":
        from powerband.extras import require

        require("torch", "LLM")
        from powerband.engine.offline.llm import LLM

        return LLM
    if name == "LoRARequest":
        from powerband.engine.offline.adapters import LoRARequest

        return LoRARequest
    if name == "SamplingParams":
        from powerband.core.params import SamplingParams

        return SamplingParams
    if name == "PoolingParams":
        from powerband.core.params import PoolingParams

        return PoolingParams
    if name == "StructuredOutputsParams":
        from powerband.core.structured_outputs import StructuredOutputsParams

        return StructuredOutputsParams
    if name == "__version__":
        from importlib.metadata import version

        return version("powerband")
    raise AttributeError(f"module 'powerband' has no attribute '{name}'")
