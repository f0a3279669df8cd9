"""Everything that shapes one replica's engine, as one flat, frozen value.

The same fields are flags (`--max-num-seqs`), environment variables (`POWERBAND_MAX_NUM_SEQS`), keys of a settings file
and keyword arguments of `powerband.LLM`. The commonest carry vLLM's names. `setting` documents each one and says what
it may hold; `check_values` enforces that wherever a value comes from.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from powerband.errors import UsageError

MEMORY_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
MAX_ADAPTER_NAME = 128
MEMORY_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def setting(
    default: Any, help: str, *, group: str, minimum: float | None = None, maximum: float | None = None, was: str = ""
) -> Any:
    """A dataclass field that knows its help text, its group in `--help`, and the range of its numbers (inclusive).

    was: its name in the version before, which still works, with a warning.
    """
    renamed = {"was": was} if was else {}
    return field(
        default=default, metadata={"help": help, "group": group, "minimum": minimum, "maximum": maximum, **renamed}
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Settings of one engine. Raises UsageError naming the field when a value is of the wrong type or out of range."""

    model: str = setting("demo", "Folder, Hugging Face id, or 'demo' for the model in the package", group="Model")
    revision: str | None = setting(None, "Branch, tag or commit on the Hugging Face hub", group="Model")
    tokenizer: str | None = setting(None, "Folder or id of another tokenizer; default: the model's", group="Model")
    served_model_name: str | None = setting(None, "Name in the API; default: MODEL as given", group="Model")
    chat_template: str | None = setting(
        None, "File with a Jinja chat template that replaces the model's", group="Model"
    )
    tool_call_parser: Literal[
        "auto",
        "none",
        "hermes",
        "qwen3_coder",
        "llama3_json",
        "pythonic",
        "mistral",
        "mistral_v11",
        "gemma3",
        "openai",
    ] = setting("auto", "Format in which the model calls tools; auto: by its chat template", group="Model")
    reasoning_parser: Literal["auto", "none", "qwen3", "deepseek_r1", "mistral", "openai_gptoss"] = setting(
        "auto", "Format of the model's reasoning; auto: by its chat template; none: it is text", group="Model"
    )
    generation_config: str = setting(
        "auto",
        "Defaults of sampling parameters: auto: the model's generation_config.json; off, or vllm: neutral ones; "
        "or a folder with another generation_config.json",
        group="Model",
    )
    convert: Literal["auto", "embed"] = setting(
        "auto",
        "embed: a language model also gives embeddings: the last token, normalized; auto: as the checkpoint says",
        group="Model",
    )
    load_format: Literal["auto", "dummy"] = setting(
        "auto", "'dummy' fills the weights with random numbers", group="Model"
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = setting(
        "auto", "Precision of weights and activations; auto: as stored, if the device is fast at it", group="Model"
    )
    quantization: Literal["none", "int8", "int4"] = setting(
        "none", "Quantize the weights of projections to 8 or 4 bits while loading (CPU)", group="Model"
    )
    quantize_head: bool = setting(
        True, "With quantized weights: quantize the output head to 8 bits; off: keep it in bfloat16", group="Model"
    )
    weight_cache: Literal["auto", "off"] = setting(
        "auto",
        "CPU: store quantized weights in the cache directory, for a faster next start; 16-bit weights are not stored",
        group="Model",
    )
    max_model_len: int | None = setting(
        None, "Maximum prompt plus output, in tokens; default: the model's own", group="Model", minimum=1
    )
    seed: int = setting(0, "Random seed for requests without one, and for dummy weights", group="Model", minimum=0)

    lora: tuple[str, ...] = setting(
        (), "LoRA adapter NAME=PATH, a folder or Hugging Face id as PEFT saves it; may be repeated", group="Adapters"
    )
    max_loras: int | None = setting(
        None,
        "Adapters that may be loaded at once; default: those of --lora; with more, others can be loaded while serving",
        group="Adapters",
        minimum=0,
        maximum=4096,
    )
    max_lora_rank: int = setting(
        16, "Maximum rank of an adapter; memory is kept for it", group="Adapters", minimum=1, maximum=256
    )

    device: Literal["auto", "cpu", "cuda"] = setting("auto", "Device to run on", group="Device")
    threads: int | None = setting(
        None, "CPU threads of the engine; default: one per physical core", group="Device", minimum=1, maximum=1024
    )
    attention_backend: Literal["auto", "reference", "cpu", "triton"] = setting(
        "auto", "Attention implementation", group="Device"
    )
    kernels: Literal["auto", "off"] = setting(
        "auto", "CPU: use C++ kernels, compiled at the first start; off: use plain torch", group="Device"
    )
    enforce_eager: bool = setting(False, "CUDA: do not capture graphs", group="Device")
    async_scheduling: bool | None = setting(
        None, "Schedule the next step while the current one runs; default: on for CUDA, off for CPU", group="Device"
    )

    block_size: int = setting(32, "Tokens per block of KV cache", group="Memory", minimum=1, maximum=4096)
    kv_cache_memory: str | None = setting(
        None, "Memory for the KV cache, e.g. 4GiB; default: what the memory plan leaves", group="Memory"
    )
    kv_cache_dtype: Literal["auto", "bfloat16", "int8"] = setting(
        "auto",
        "Precision of the KV cache; auto: int8 with quantized weights, else that of the activations",
        group="Memory",
    )
    gpu_memory_utilization: float = setting(
        0.9, "Fraction of the device's memory that may be used in total (CUDA)", group="Memory", minimum=0.01, maximum=1
    )
    enable_prefix_caching: bool = setting(True, "Reuse the KV cache of common prompt prefixes", group="Memory")

    max_num_seqs: int = setting(256, "Maximum requests that run at once", group="Scheduling", minimum=1)
    max_num_batched_tokens: int = setting(2048, "Token budget of a step", group="Scheduling", minimum=1)
    long_prefill_token_threshold: int = setting(
        0,
        "Maximum prefill chunk of one request in a step, in tokens; 0: the token budget",
        group="Scheduling",
        minimum=0,
    )
    scheduling_policy: Literal["fcfs", "priority", "shortest", "longest-prefix", "deadline", "fair"] = setting(
        "fcfs", "Order in which requests are scheduled", group="Scheduling"
    )
    max_num_queued_reqs: int = setting(
        2048, "Maximum waiting requests; new ones are rejected (429)", group="Scheduling", minimum=1
    )
    max_num_queued_tokens: int = setting(
        4_000_000,
        "Maximum prompt tokens of waiting requests; new requests are rejected (429)",
        group="Scheduling",
        minimum=1,
    )
    step_log: str | None = setting(
        None, "Append each step's shape and duration to this file (JSON lines)", group="Scheduling"
    )

    def __post_init__(self) -> None:
        check_values(self)
        if self.kv_cache_memory is not None:
            memory_bytes(self.kv_cache_memory)
        self._check_adapters()

    @property
    def adapter_slots(self) -> int:
        """Adapters that may be loaded at once, and that memory is kept for."""
        return len(self.lora) if self.max_loras is None else self.max_loras

    def adapters(self) -> dict[str, str]:
        """The source of each adapter of `lora`, by name."""
        return dict(_named_adapter(text) for text in self.lora)

    def _check_adapters(self) -> None:
        names = [name for name, _ in map(_named_adapter, self.lora)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UsageError(f"lora has the name {twice!r} twice.", hint="Each needs its own.", param="lora")
        served = self.served_model_name or self.model
        if served in names:
            raise UsageError(f"lora has the name {served!r}, which is the model's.", hint="Rename it.", param="lora")
        if len(names) > self.adapter_slots:
            raise UsageError(
                f"lora names {len(names)} adapters, but max_loras is {self.max_loras}.",
                hint=f"Use --max-loras {len(names)}, or leave it out.",
                param="max_loras",
            )


def _named_adapter(text: str) -> tuple[str, str]:
    """'NAME=PATH' in its two parts. Raises UsageError."""
    name, separator, source = str(text).partition("=")
    if not separator or not source or not is_adapter_name(name):
        raise UsageError(
            f"lora is {str(text)[:200]!r}; it must be NAME=PATH.",
            hint=f"Such as --lora sql=/adapters/sql. A name has at most {MAX_ADAPTER_NAME} printable characters.",
            param="lora",
        )
    return name, source


def is_adapter_name(name: str) -> bool:
    return 0 < len(name) <= MAX_ADAPTER_NAME and name.isprintable() and name == name.strip()


def memory_bytes(text: str) -> int:
    """'4GiB', '512 MB' or '1000000' as bytes. Raises UsageError for anything else."""
    match = re.fullmatch(r"\s*+(\d++(?:\.\d++)?)\s*+([a-z]*+)\s*+", text, re.IGNORECASE | re.ASCII)
    unit = MEMORY_UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None or float(match[1]) == 0:
        raise UsageError(
            f"kv_cache_memory is {text!r}, which is not an amount of memory.",
            hint="Write a number and a unit, such as 4GiB, 512MiB or 8GB.",
            param="kv_cache_memory",
        )
    return int(float(match[1]) * unit)


@cache
def value_types(settings: type) -> dict[str, Any]:
    """The declared type of each field of a settings class."""
    return get_type_hints(settings)


def choices(declared: Any) -> tuple[Any, ...]:
    """The allowed values of a Literal type (also inside `… | None`); empty for any other type."""
    if get_origin(declared) is Literal:
        return get_args(declared)
    return next((get_args(t) for t in get_args(declared) if get_origin(t) is Literal), ())


def check_values(settings: Any) -> None:
    """Raise UsageError for the first field of a settings value that has the wrong type, choice or range."""
    declared = value_types(settings.__class__)
    for item in fields(settings):
        value = getattr(settings, item.name)
        wanted = _complaint(value, declared[item.name], item.metadata)
        if wanted:
            raise UsageError(f"{item.name} is {value!r}; it must be {wanted}.", param=item.name)


def _complaint(value: Any, declared: Any, metadata: Any) -> str:
    allowed = choices(declared)
    kinds = get_args(declared) if get_origin(declared) in (UnionType, Union) else (declared,)
    if value is None and NoneType in kinds:
        return ""
    if allowed:
        return "" if value in allowed else "one of " + ", ".join(allowed)
    kind = next(k for k in kinds if k is not NoneType)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        kind = int
    if not isinstance(value, get_origin(kind) or kind) or (isinstance(value, bool) and kind is not bool):
        return KIND_NAMES.get(kind, str(kind))
    minimum, maximum = metadata.get("minimum"), metadata.get("maximum")
    if (minimum is not None and not value >= minimum) or (maximum is not None and not value <= maximum):
        if maximum is None:
            return f"at least {minimum}"
        return f"between {minimum} and {maximum}" if minimum is not None else f"at most {maximum}"
    return ""


KIND_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    tuple[str, ...]: "a list of texts",
}
