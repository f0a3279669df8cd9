"""The arithmetic of a memory plan: how large each part is with so many blocks of KV cache, and how many blocks fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from powerband.cost.footprint import (
    activation_bytes,
    adapter_bytes,
    attention_bytes,
    runtime_bytes,
    sampling_bytes,
)
from powerband.cost.precision import kv_dtype, weight_precisions
from powerband.spec.checkpoint.quantization import WeightPrecisions
from powerband.spec.kv_layout import KVLayout, kv_layout
from powerband.spec.model.counts import kv_bytes_per_token_per_layer, parameter_bytes
from powerband.spec.model.model_spec import ModelSpec
from powerband.spec.settings import EngineSettings, memory_bytes

LABELS = {
    "weights": "weights",
    "adapters": "LoRA adapters",
    "kv_cache": "KV cache",
    "activations": "activations",
    "attention": "attention workspace",
    "sampling": "logits and sampling",
    "runtime": "runtime",
}

# CPU: the default KV cache has room for `max_num_seqs` requests of this length, where memory allows.
_DEFAULT_LENGTH = 1024
# CPU: and takes at most this share of the memory that is free, for others use the machine, too.
_CPU_KV_FRACTION = 0.25
# CPU: of the memory that is free, this share may be used in all; without the rest, the system starts to kill.
_CPU_USABLE_FRACTION = 0.95


@dataclass(frozen=True, slots=True)
class Sizing:
    """One model under one choice of settings on one device. Sizes in bytes."""

    spec: ModelSpec
    settings: EngineSettings
    kind: Literal["cpu", "cuda"]
    dtype: str
    device_memory: int
    free_memory: int

    @property
    def requested_len(self) -> int:
        return self.settings.max_model_len or self.spec.max_position

    @property
    def available(self) -> int:
        if self.kind == "cpu":
            return int(self.free_memory * self.usable_fraction)
        return min(self.free_memory, int(self.device_memory * self.usable_fraction))

    @property
    def usable_fraction(self) -> float:
        """Of the device's memory (CUDA), or of what is free (CPU), the share that the engine may use."""
        return self.settings.gpu_memory_utilization if self.kind == "cuda" else _CPU_USABLE_FRACTION

    @property
    def held(self) -> WeightPrecisions:
        return weight_precisions(self.spec, self.settings, self.kind, self.dtype)

    @property
    def kv_dtype(self) -> str:
        return kv_dtype(self.settings, self.dtype, self.held, can_be_int8=self.kind == "cpu" and self.in_place)

    @property
    def layout(self) -> KVLayout:
        """Of the KV cache. Where it has several groups of layers, all that is said of blocks is said of its pages."""
        return kv_layout(
            self.spec.layers,
            self.settings.block_size,
            step_tokens=self.settings.max_num_batched_tokens,
            max_model_len=self.requested_len,
        )

    @property
    def block_bytes(self) -> int:
        per_layer = kv_bytes_per_token_per_layer(self.spec, self.kv_dtype)
        return self.settings.block_size * self.layout.group_layers * per_layer

    @property
    def in_place(self) -> bool:
        """Whether attention reads the cache where it lies. Asked for 'auto', a CPU is taken to have our kernels."""
        asked = self.settings.attention_backend
        if asked != "auto" or self.kind == "cuda":
            return asked != "reference"
        return self.dtype == "bfloat16" and self.settings.block_size == 32 and self.spec.head_dim % 32 == 0

    def blocks_for(self, tokens: int) -> int:
        """Blocks of one request."""
        return self.layout.max_pages(-(-tokens // self.settings.block_size))

    def tokens_in(self, num_blocks: int) -> int:
        """Positions that so many blocks hold, of requests as long as they may be."""
        return self.layout.tokens(num_blocks, self.max_len(num_blocks))

    def max_len(self, num_blocks: int) -> int:
        """Positions of the longest request."""
        return min(self.requested_len, self.layout.max_tokens(num_blocks))

    def parts(self, num_blocks: int) -> dict[str, int]:
        """Every part by name. None of them shrinks as `num_blocks` grows."""
        spec, settings, kind, dtype = self.spec, self.settings, self.kind, self.dtype
        kv_tokens = self.tokens_in(num_blocks)
        max_len = self.max_len(num_blocks)
        tokens = settings.max_num_batched_tokens
        rows = min(settings.max_num_seqs, tokens)
        slots = settings.adapter_slots
        adapters = {"adapters": slots * adapter_bytes(spec, rank=settings.max_lora_rank, dtype=dtype)} if slots else {}
        return {
            "weights": parameter_bytes(spec, dtype, self.held),
            **adapters,
            "kv_cache": num_blocks * self.block_bytes,
            "activations": activation_bytes(spec, tokens=tokens, dtype=dtype),
            "attention": attention_bytes(
                spec,
                in_place=self.in_place,
                tokens=tokens,
                rows=rows,
                max_len=max_len,
                kv_tokens=kv_tokens,
                dtype=dtype,
            ),
            "sampling": sampling_bytes(spec, rows=rows, dtype=dtype) if spec.generates else 0,
            "runtime": runtime_bytes(spec, kind=kind, graphs=not settings.enforce_eager, max_len=max_len, dtype=dtype),
        }

    def total(self, num_blocks: int) -> int:
        return sum(self.parts(num_blocks).values())

    @property
    def _encoder_blocks(self) -> int:
        """Blocks of two steps' texts, which take no memory: with them the scheduler counts what is on its way."""
        tokens = self.settings.max_num_batched_tokens
        return 2 * (-(-tokens // self.settings.block_size) + self.settings.max_num_seqs)

    def max_blocks(self) -> int:
        """The most blocks with which everything fits into what is available; 0 when not even one does."""
        if self.spec.encoder is not None:
            return self._encoder_blocks if self.total(0) <= self.available else 0
        low, high = 0, self.available // self.block_bytes + 1
        while high - low > 1:
            middle = (low + high) // 2
            if self.total(middle) <= self.available:
                low = middle
            else:
                high = middle
        return low

    def chosen_blocks(self) -> int:
        """Blocks by the user's word, else the device's default. The former may be more than fit."""
        if self.spec.encoder is not None:
            return self._encoder_blocks
        if self.settings.kv_cache_memory is not None:
            return memory_bytes(self.settings.kv_cache_memory) // self.block_bytes
        limit = self.max_blocks()
        if self.kind == "cuda":
            return limit
        one = self.blocks_for(self.requested_len)
        layout, length = self.layout, min(self.requested_len, _DEFAULT_LENGTH)
        usual = self.settings.max_num_seqs * layout.pages(-(-length // layout.block_size)) + layout.reserved
        share = int(self.free_memory * _CPU_KV_FRACTION) // self.block_bytes
        # One request of a length that was asked for comes before the share.
        floor = one if self.settings.max_model_len is not None else 1
        return min(max(min(max(usual, one), share), floor), limit)


def readable(size: int) -> str:
    """Bytes as people read them: '1.50 GiB', '512.0 MiB', '12 KiB'."""
    if abs(size) >= 1 << 30:
        return f"{size / (1 << 30):.2f} GiB"
    if abs(size) >= 1 << 20:
        return f"{size / (1 << 20):.1f} MiB"
    return f"{size / (1 << 10):.0f} KiB"


def as_option(size: int, *, round_up: bool = True) -> str:
    """Bytes as a value for `--kv-cache-memory`, in whole MiB."""
    mib = -(-size // (1 << 20)) if round_up else size // (1 << 20)
    return f"{mib // 1024}GiB" if mib % 1024 == 0 else f"{mib}MiB"
