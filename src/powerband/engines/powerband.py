"""Our own engine: `powerband serve`, with the names of spec.settings.EngineSettings."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from powerband.engines.base import EngineAdapter
from powerband.engines.capabilities import EngineCapabilities
from powerband.engines.launch import Command, LaunchRequest
from powerband.extras import require
from powerband.spec.deployment import KVPrecision, Quantization
from powerband.spec.settings import EngineSettings

if TYPE_CHECKING:
    from powerband.spec.hardware.profile import DeviceProfile

MAX_LABEL_CHARS = 512  # of `user` and `cache_salt`
_OWN = (sys.executable, "-m", "powerband")
_POSITIONAL = "model"


def _command(request: LaunchRequest) -> Command:
    replica = request.replica
    request.require(tensor_parallel=1, pipeline_parallel=1, expert_parallel=1, offload_share=0.0, draft_tokens=0)
    if replica.kv_precision == "fp8":
        raise request.unsupported("kv_precision", "It supports 16bit, int8 and float32.")
    request.check_draft_method()
    settings = _settings(request)
    if not request.executable:
        require("torch", "Powerband's engine")
    command = (
        *(request.executable or _OWN),
        "serve",
        request.model,
        f"--host={request.host}",
        f"--port={request.port}",
        *_flags(settings),
    )
    if request.api_key_file is not None:
        command = (*command, f"--api-key-file={request.api_key_file}")
    return Command((*command, *request.extra))


def _settings(request: LaunchRequest) -> EngineSettings:
    """The settings of the planner's memory plan. Weights that are stored as planned are not quantized again."""
    from powerband.cost.replica_memory import engine_settings  # only to start replicas

    replica = request.replica
    is_stored = request.to_quantize() == "none"
    more: dict[str, Any] = {
        "model": request.model,
        "served_model_name": request.served_name,
        "threads": request.threads if request.is_cpu else None,
        "device": "cpu" if request.is_cpu else "cuda",
    }
    if is_stored and replica.quantization != "none" and replica.kv_precision == "16bit":
        more["kv_cache_dtype"] = "bfloat16"  # auto would be int8 beside quantized weights
    planned = replace(replica, quantization="none") if is_stored else replica
    return engine_settings(request.spec, planned, **more)


def _flags(settings: EngineSettings) -> tuple[str, ...]:
    """The settings that differ from the defaults, as flags."""
    found = []
    for item in fields(settings):
        value = getattr(settings, item.name)
        if item.name == _POSITIONAL or value == item.default:
            continue
        flag = item.name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            found.append(f"--{flag}={value}")
    return tuple(found)


def _missing_kernels(profile: DeviceProfile, quantization: Quantization) -> str:
    if profile.kind == "cuda" and quantization != "none":
        return "powerband computes in 16 bits on GPUs so far"
    if profile.kind == "cpu" and quantization not in _CAPABILITIES.online_quantizations:
        online = ("16 bits" if name == "none" else name for name in _CAPABILITIES.online_quantizations)
        return f"powerband on a CPU computes in {', '.join(online)}"
    return ""


def _kv_precisions(
    _profile: DeviceProfile, quantization: Quantization, _stored: KVPrecision | None
) -> tuple[KVPrecision, ...]:
    return ("int8",) if quantization in ("int8", "int4") else ("16bit",)


def _tenant_fields(tenant: str, user: str | None, _cache_salt: str | None) -> Mapping[str, str]:
    label = f"{tenant}/{user}" if user else tenant
    if len(label) > MAX_LABEL_CHARS:  # truncating it could give two users the same label
        label = f"{tenant}/{hashlib.sha256(label.encode()).hexdigest()}"
    return {"user": label}


_CAPABILITIES = EngineCapabilities(
    kinds=("cpu", "cuda"),
    supports_multi_device=False,
    supports_speculation=False,
    online_quantizations=("none", "int8", "int4"),
    missing_kernels=_missing_kernels,
    kv_precisions=_kv_precisions,
)
POWERBAND = EngineAdapter(
    name="powerband",
    display_name="Powerband",
    owned_by="powerband",
    capabilities=_CAPABILITIES,
    command=_command,
    ready_path="/readyz",
    ready_shows_progress=True,
    config_path="/admin/config",
    metrics={
        "running": (b"powerband_requests_running",),
        "waiting": (b"powerband_requests_waiting",),
        "kv_usage": (b"powerband_kv_cache_usage_ratio",),
        "preemptions": (b"powerband_preemptions_total",),
        "prefix_queries": (b"powerband_prefix_cache_queries_total",),
        "prefix_hits": (b"powerband_prefix_cache_hits_total",),
        "prompt_tokens": (b"powerband_prompt_tokens_total",),
        "output_tokens": (b"powerband_generation_tokens_total",),
    },
    histograms={"ttft": b"powerband_ttft_seconds", "queue": b"powerband_queue_seconds"},
    endpoints=frozenset(
        (
            *("/v1/responses", "/v1/responses/input_tokens", "/v1/messages", "/v1/messages/count_tokens"),
            *("/v1/embeddings", "/v1/score", "/score", "/v1/rerank", "/rerank", "/v2/rerank"),
        )
    ),
    supports_n=True,
    lists_adapters=True,
    returns_token_ids=True,
    tenant_fields=_tenant_fields,
    retry_after_is_per_request=True,
    takes_resume_token_ids=True,
    resume_text="another replica resumes its streams",
)
