"""llama.cpp's llama-server. Names of metrics as its code has them."""

from __future__ import annotations

from powerband.engines.base import EngineAdapter

LLAMACPP = EngineAdapter(
    name="llamacpp",
    display_name="llama.cpp",
    owned_by="llamacpp",
    metrics={  # only with --metrics
        "running": (b"llamacpp:requests_processing",),
        "waiting": (b"llamacpp:requests_deferred",),
        "kv_usage": (b"llamacpp:kv_cache_usage_ratio",),
        "prompt_tokens": (b"llamacpp:prompt_tokens_total",),
        "output_tokens": (b"llamacpp:tokens_predicted_total",),
    },
)
