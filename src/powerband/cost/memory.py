"""The memory plan: what an engine will need, how many blocks of KV cache fit, and how long a request may be.

One calculation, used before loading, shown beside what was measured, and quoted when something does not fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from powerband.cost.memory_advice import explain_out_of_memory
from powerband.cost.sizing import LABELS, Sizing, as_option, readable
from powerband.errors import UsageError
from powerband.spec.checkpoint.quantization import WeightPrecisions
from powerband.spec.kv_layout import KVLayout
from powerband.spec.model.model_spec import ModelSpec
from powerband.spec.settings import EngineSettings


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Where the memory of one engine goes. `parts` sum to `total_bytes`, which is at most `available_bytes`."""

    kind: Literal["cpu", "cuda"]
    dtype: str  # of activations, and of weights that are not quantized
    held: WeightPrecisions
    kv_dtype: str
    device_memory_bytes: int
    available_bytes: int  # that the engine may use
    parts: Mapping[str, int]  # bytes by name: weights, adapters, kv_cache, activations, attention, sampling, runtime
    num_blocks: int  # of the KV cache; where it has several groups of layers, its pages
    layout: KVLayout
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_loras: int = 0
    max_lora_rank: int = 0
    notes: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def block_size(self) -> int:
        return self.layout.block_size

    @property
    def kv_tokens(self) -> int:
        """Positions that the KV cache holds, of requests as long as they may be: a window's earlier ones are free."""
        return self.layout.tokens(self.num_blocks, self.max_model_len)

    def as_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "dtype": self.dtype,
            "weights_dtype": self.dtype if self.held.layers == "none" else self.held.layers,
            "head_dtype": self.dtype if self.held.head == "none" else self.held.head,
            "kv_cache_dtype": self.kv_dtype,
            "device_memory_bytes": self.device_memory_bytes,
            "available_bytes": self.available_bytes,
            "total_bytes": self.total_bytes,
            **{f"{name}_bytes": size for name, size in self.parts.items()},
            "num_blocks": self.num_blocks,
            "block_size": self.block_size,
            "kv_tokens": self.kv_tokens,
            "kv_layout": asdict(self.layout),
            "max_model_len": self.max_model_len,
            "notes": list(self.notes),
        }

    def precisions(self) -> list[str]:
        """What is held in which precision: the dtype, and whatever differs from it."""
        held = {"weights": self.held.layers, "head": self.held.head, "KV": self.kv_dtype}
        return [self.dtype, *(f"{part} {kind}" for part, kind in held.items() if kind not in ("none", self.dtype))]

    def _kv_text(self) -> str:
        if not self.layout.windowed:
            return f"{self.num_blocks} blocks, {self.kv_tokens} tokens"
        return f"{self.num_blocks} pages, {self.kv_tokens} tokens of {self.max_model_len} each"

    def table(self, measured: Mapping[str, int] | None = None) -> str:
        """Plain text, one line per part: predicted and, where known, measured bytes.

        `measured`: bytes by the names in `parts`, and "total".
        """
        found = measured or {}
        details = {
            "adapters": f" ({self.max_loras} of rank {self.max_lora_rank})",
            "kv_cache": f" ({self._kv_text()})",
            "activations": f" ({self.max_num_batched_tokens} tokens)",
            "sampling": f" ({min(self.max_num_seqs, self.max_num_batched_tokens)} rows)",
        }
        rows = [(LABELS[name] + details.get(name, ""), size, found.get(name)) for name, size in self.parts.items()]
        rows.append(("total", self.total_bytes, found.get("total")))
        rows.append((f"available of {readable(self.device_memory_bytes)}", self.available_bytes, None))
        title = f"memory ({', '.join([self.kind, *self.precisions()])})"
        width = max(len(row[0]) for row in [*rows, (title, 0, 0)])
        lines = [f"{title:<{width}}  {'predicted':>10}" + "    measured" * bool(found)]
        for label, predicted, actual in rows:
            line = f"{label:<{width}}  {readable(predicted):>10}"
            lines.append(f"{line}  {readable(actual) if actual is not None else '-':>10}" if found else line)
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def plan_memory(
    spec: ModelSpec,
    settings: EngineSettings,
    device_memory_bytes: int,
    *,
    kind: Literal["cpu", "cuda"],
    free_memory_bytes: int | None = None,
    dtype: str | None = None,
) -> MemoryPlan:
    """Plan an engine of `settings` on a device.

    `free_memory_bytes`: of the device, before anything is loaded; default: all of it.
    `dtype`: of activations, and of weights and KV cache that are not quantized; default: the setting's, and for "auto"
    the checkpoint's, or bfloat16 beside quantized weights.
    Raises UsageError when the settings contradict the model, and EnvironmentFault, with what would help, when the
    engine cannot fit.
    """
    free = min(device_memory_bytes, device_memory_bytes if free_memory_bytes is None else free_memory_bytes)
    if settings.max_model_len is not None and settings.max_model_len > spec.max_position:
        raise UsageError(
            f"max_model_len is {settings.max_model_len}, but the model knows only {spec.max_position} positions.",
            hint=f"Use {spec.max_position} or less, or leave it out.",
            param="max_model_len",
        )
    if spec.encoder is not None:
        _check_encoder(settings)
    dtype = dtype or (settings.dtype if settings.dtype != "auto" else _stored_precision_text(spec, settings))
    sizing = Sizing(spec, settings, kind, dtype, device_memory_bytes, free)
    blocks = sizing.chosen_blocks()
    max_len = sizing.max_len(blocks)
    if spec.encoder is not None:
        max_len = min(max_len, settings.max_num_batched_tokens)
    too_short = settings.max_model_len is not None and max_len < settings.max_model_len
    if blocks < 1 or blocks > sizing.max_blocks() or too_short:
        raise explain_out_of_memory(sizing)
    return MemoryPlan(
        kind=kind,
        dtype=dtype,
        held=sizing.held,
        kv_dtype=sizing.kv_dtype,
        device_memory_bytes=device_memory_bytes,
        available_bytes=sizing.available,
        parts=sizing.parts(blocks),
        num_blocks=blocks,
        layout=sizing.layout,
        max_model_len=max_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_loras=settings.adapter_slots,
        max_lora_rank=settings.max_lora_rank,
        notes=_notes(sizing, max_len),
    )


def _check_encoder(settings: EngineSettings) -> None:
    """An encoder has no KV cache, and computes a text in one step."""
    if settings.kv_cache_memory is not None:
        raise UsageError(
            "kv_cache_memory is set, but an encoder has no KV cache.", hint="Leave it out.", param="kv_cache_memory"
        )
    if (settings.max_model_len or 0) > settings.max_num_batched_tokens:
        raise UsageError(
            f"max_model_len is {settings.max_model_len}, but an encoder computes a text in one step, and "
            f"max_num_batched_tokens is {settings.max_num_batched_tokens}.",
            hint="Raise max_num_batched_tokens.",
            param="max_num_batched_tokens",
        )


def _stored_precision_text(spec: ModelSpec, settings: EngineSettings) -> str:
    return "bfloat16" if settings.quantization != "none" or spec.weight_format is not None else spec.dtype


def _notes(sizing: Sizing, max_len: int) -> tuple[str, ...]:
    if max_len == sizing.requested_len:
        return ()
    whole = sizing.blocks_for(sizing.requested_len)
    note = (
        f"max_model_len is {max_len}, as much as the KV cache holds; the model's own {sizing.requested_len} would need "
    )
    if whole <= sizing.max_blocks():
        return (note + f"--kv-cache-memory {as_option(whole * sizing.block_bytes)}",)
    return (note + f"{readable(whole * sizing.block_bytes)} of KV cache",)
