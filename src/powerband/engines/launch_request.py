"""A replica to start, and what follows for its engine from the plan, the model's configuration and the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from powerband.cost.replica_memory import (
    ReplicaMemory,
    kv_bytes_per_token,
    layer_weight_bytes,
    plan_replica,
)
from powerband.engines.capabilities import EngineCapabilities
from powerband.errors import EnvironmentFault, UsageError
from powerband.spec.deployment import LOCAL, EngineName, Quantization, Replica
from powerband.spec.hardware.catalog import load_catalog, local_profile
from powerband.spec.hardware.device import detect_cpu
from powerband.spec.hardware.profile import DeviceProfile
from powerband.spec.model.checkpoint_precision import CheckpointPrecision, read_for_planning
from powerband.spec.model.model_spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class LaunchRequest:
    """The replica to start. The model's configuration and the device's profile are read on first use."""

    engine: EngineName
    capabilities: EngineCapabilities  # of the engine
    model: str  # a folder, 'demo' or a Hugging Face id
    replica: Replica
    port: int | str  # a number, or a placeholder for one
    served_name: str
    host: str = "127.0.0.1"
    threads: int | None = None  # of one replica on a CPU
    executable: tuple[str, ...] = ()  # (): the usual one
    api_key_file: str | None = None
    draft_method: str = ""  # for the plan's draft tokens: 'ngram', 'mtp' or the name of a draft model
    extra: tuple[str, ...] = ()  # arguments passed to the engine unchanged, after ours

    @cached_property
    def _read(self) -> tuple[ModelSpec, CheckpointPrecision]:
        return read_for_planning(_config_of(self.model))

    @property
    def spec(self) -> ModelSpec:
        return self._read[0]

    @property
    def stored(self) -> CheckpointPrecision:
        return self._read[1]

    @cached_property
    def profile(self) -> DeviceProfile:
        """Raises UsageError for an unknown device."""
        local = local_profile()
        if local is not None and self.replica.device in (LOCAL, local.name):
            return local
        return load_catalog().find(self.replica.device)

    @property
    def is_cpu(self) -> bool:
        """The device of a plan that was written by hand may be just 'cpu'."""
        return self.replica.device == "cpu" or self.profile.kind == "cpu"

    @property
    def host_memory_bytes(self) -> int:
        return detect_cpu().memory_bytes

    @property
    def layer_weight_bytes(self) -> int:
        """Weights of the layers of the fullest rank."""
        return layer_weight_bytes(self.spec, self.replica)

    @property
    def kv_bytes_per_token(self) -> int:
        """Of one rank."""
        return kv_bytes_per_token(self.spec, self.replica)

    @cached_property
    def memory(self) -> ReplicaMemory:
        """On each device. Raises UsageError when the replica does not fit."""
        found = plan_replica(self.spec, self.profile, self.replica, self.engine)
        if found.problem:
            raise UsageError(f"{self.model} on {self.profile.name}: {found.problem}.", param="plan")
        return found

    def precision(self, kv_names: Mapping[str, str]) -> dict[str, str]:
        """The flags that vLLM and SGLang share. kv_names: the engine's words for KV precisions. Raises UsageError."""
        kv = kv_names.get(self.replica.kv_precision)
        if kv is None:
            raise self.unsupported("kv_precision", f"It supports: {', '.join(kv_names)}.")
        if kv == "auto" and self.stored.kv_precision is not None:
            kv = "bfloat16"
        quantization = self.to_quantize()
        found = {"--kv-cache-dtype": kv}
        return {**found, "--quantization": quantization} if quantization != "none" else found

    def to_quantize(self) -> Quantization:
        """How the engine quantizes the weights when it loads them; 'none': not at all. Raises UsageError."""
        desired = self.replica.quantization
        if desired == self.stored.quantization:
            return "none"
        if desired == "none" or desired not in self.capabilities.loads:
            raise self.unsupported("quantization", f"The checkpoint of {self.model} holds {self.stored.quantization}.")
        if self.stored.quantization != "none":
            raise self.unsupported("quantization", f"The checkpoint is quantized already: {self.stored.quantization}.")
        return desired

    def unsupported(self, name: str, hint: str = "") -> UsageError:
        """The error for a setting of the plan that the engine does not support."""
        value = getattr(self.replica, name)
        return UsageError(f"The plan has {name}: {value}, which {self.engine} does not support.", hint=hint, param=name)

    def require(self, **supported: object) -> None:
        """Raises UsageError unless each setting has the only value that the engine supports."""
        for name, value in supported.items():
            if getattr(self.replica, name) != value:
                raise self.unsupported(name, f"It supports: {value}.")

    def check_draft_method(self) -> str:
        """'' if the plan has no draft tokens. Raises UsageError if it has, but no method; or the other way round."""
        method, count = self.draft_method, self.replica.draft_tokens
        if count and not method:
            hint = "Name it (ngram, or a draft model), or set draft_tokens to 0."
            raise UsageError(
                f"The plan has {count} draft tokens, but no method that proposes them.", hint=hint, param="plan"
            )
        if method and not count:
            raise UsageError(f"draft_method is {method}, but the plan has no draft tokens.", param="draft_method")
        return method


def _config_of(model: str) -> Path:
    """The path of a model's config.json; that of a Hugging Face id is downloaded."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder / "config.json"
    if model == "demo":
        import powerband

        return Path(powerband.__file__).parent / "demo" / "config.json"
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(model, "config.json"))
    except (HfHubHTTPError, HFValidationError, OSError) as problem:
        reason = str(problem).splitlines()[0]
        raise EnvironmentFault(
            f"Cannot read the configuration of {model}: {reason}", code="model_not_found", param="model"
        ) from None
