"""How a model is laid out on devices: one replica, and pools of equal ones.

    pool ── count ──► replica ── tensor × pipeline ──► ranks, one device each

Names are those of EngineSettings where there are such; `quantization` and `kv_cache_dtype` are said for any engine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from powerband.errors import UsageError
from powerband.renamed import warn_renamed
from powerband.spec.config_reader import shown

# How a replica holds the matrices of its layers, and in what it multiplies:
# none: 16 bits. fp8: weights and activations in 8-bit floats, scales of activations found at run time; fp8_static: in
# the checkpoint. int8: weights only. w8a8: weights and activations in 8-bit integers. int4: weights only.
# nvfp4: weights and activations in 4-bit floats. mxfp4: the experts' weights only.
Quantization = Literal["none", "fp8", "fp8_static", "int8", "w8a8", "int4", "nvfp4", "mxfp4"]
KVPrecision = Literal["float32", "16bit", "fp8", "int8"]
EngineName = Literal["powerband", "vllm", "sglang", "trtllm"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)


LOCAL = "local"  # the name of this machine as a device
OLD_LOCAL = "here"  # in version 0.1


def local_name(device: str) -> str:
    """The name of a device, with the present name of this machine for the old one."""
    if device != OLD_LOCAL:
        return device
    warn_renamed("the device 'here'", "'local'")
    return LOCAL


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """One engine that can answer alone, on tensor_parallel × pipeline_parallel devices of one kind and one node."""

    device: str  # a name in the catalog
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    expert_parallel: int = 1  # ranks over which whole experts are divided: 1 or tensor_parallel
    quantization: Quantization = "none"
    kv_precision: KVPrecision = "16bit"
    offload_share: float = 0.0  # of the layers' weights that stay in host memory and are streamed in each step
    max_model_len: int
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    long_prefill_token_threshold: int = 0
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    draft_tokens: int = 0  # guessed in each step of a decode
    draft_acceptance: float = 0.0  # chance that one of them is accepted, given that those before it were

    def __post_init__(self) -> None:
        for name in ("tensor_parallel", "pipeline_parallel", "max_model_len", "max_num_seqs"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1.", param=name)
        if self.expert_parallel not in (1, self.tensor_parallel):
            raise UsageError(
                f"expert_parallel is {self.expert_parallel}; it must be 1 or tensor_parallel ({self.tensor_parallel}).",
                param="expert_parallel",
            )
        if not 0 <= self.offload_share <= 1 or not 0 <= self.draft_acceptance < 1:
            raise UsageError("offload_share lies between 0 and 1, draft_acceptance from 0 to below 1.", param="replica")

    @property
    def num_devices(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaPool:
    """Equal replicas that serve the same requests."""

    replica: Replica
    count: int = 1
    # Of the requests that it serves; None: no limit.
    max_prompt_tokens: int | None = field(default=None, metadata={"was": "longest_prompt"})

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UsageError(f"A pool of {self.count} replicas.", hint="At least 1.", param="count")

    @property
    def num_devices(self) -> int:
        return self.count * self.replica.num_devices


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """An engine on pools of replicas. Pools are ordered by max_prompt_tokens; the last one serves any prompt."""

    engine: EngineName
    pools: tuple[ReplicaPool, ...]

    def __post_init__(self) -> None:
        limits = [pool.max_prompt_tokens for pool in self.pools]
        bounds = [limit for limit in limits[:-1] if limit is not None]
        if not limits or limits[-1] is not None or len(bounds) != len(limits) - 1 or bounds != sorted(set(bounds)):
            raise UsageError(
                f"Pools take prompts up to {limits}.",
                hint="Each a longer one than the pool before, and the last any (no limit).",
                param="pools",
            )

    @property
    def num_devices(self) -> int:
        return sum(pool.num_devices for pool in self.pools)


def parse_quantizations(text: str) -> tuple[Quantization, ...]:
    """'none,fp8' → both; 'auto' → (): the usual ones. Raises UsageError."""
    if text == "auto":
        return ()
    names = get_args(Quantization)
    found = tuple(name for part in text.split(",") if (name := part.strip()))
    wrong = [name for name in found if name not in names]
    if wrong or not found:
        raise UsageError(
            f"Unknown quantization {shown(wrong[0] if wrong else text)}.",
            hint=f"Known: auto, {', '.join(names)}.",
            param="quantization",
        )
    return found  # type: ignore[return-value] # all of them are among the names


def parse_engines(text: str) -> tuple[EngineName, ...]:
    """'vllm,sglang' → both. Raises UsageError."""
    found = tuple(dict.fromkeys(name for part in text.split(",") if (name := part.strip())))
    wrong = [name for name in found if name not in ENGINES]
    if wrong or not found:
        raise UsageError(
            f"Unknown engine {shown(wrong[0] if wrong else text)}.",
            hint=f"Known: {', '.join(ENGINES)}.",
            param="engine",
        )
    return found  # type: ignore[return-value] # all of them are among the names
