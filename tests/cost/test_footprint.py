"""Bounds on intermediate memory against what the engine's decoder and attention really allocate, tensor by tensor."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from powerband.core.params import SamplingParams
from powerband.cost.footprint import activation_bytes, attention_bytes, sampling_bytes
from powerband.engine.attention.base import AttentionBatch, AttentionShape
from powerband.engine.attention.reference import ReferenceAttention
from powerband.engine.models.decoder import Decoder
from powerband.engine.sampling.sampler import Sampler
from powerband.spec import ModelSpec, read_model_spec

TOKENS = 256
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 64,
    "max_position_embeddings": 1024,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SIZES},
    "llama, attention outweighs the MLP": {"model_type": "llama", **SIZES, "intermediate_size": 64},
    "qwen3": {"model_type": "qwen3", **SIZES, "intermediate_size": 64},
    "gemma2": {"model_type": "gemma2", **SIZES},
    "gemma3": {"model_type": "gemma3_text", **SIZES, "intermediate_size": 64},
    "olmo2": {"model_type": "olmo2", **SIZES, "intermediate_size": 64},
    "phi3": {"model_type": "phi3", **SIZES},
    "gpt_oss": {"model_type": "gpt_oss", **SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {"model_type": "mixtral", **SIZES, "num_local_experts": 4},
    "qwen3_moe": {"model_type": "qwen3_moe", **SIZES, "num_experts": 4, "num_experts_per_tok": 4},
}


class AllocatedBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operators make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {id(a.untyped_storage()) for a in args if isinstance(a, torch.Tensor)}
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and id(tensor.untyped_storage()) not in given | self._seen:
                self._follow(tensor.untyped_storage())
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


class NoAttention(ReferenceAttention):
    """Takes no memory but its result's."""

    def begin(self, batch: AttentionBatch) -> None: ...

    def attend(self, layer: int, q: torch.Tensor, *rest: Any) -> torch.Tensor:
        return torch.zeros_like(q, memory_format=torch.contiguous_format)


def _decoder(spec: ModelSpec) -> Decoder:
    model = Decoder(spec, max_positions=1024, dtype=getattr(torch, spec.dtype), device=torch.device("cpu"))
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    return model


def _batch(contexts: list[int], new: list[int], block_size: int) -> AttentionBatch:
    """Rows whose blocks lie in reverse, so that nothing can be read in place."""
    starts = [0]
    for count in new:
        starts.append(starts[-1] + count)
    width = -(-max(contexts) // block_size)
    tables = torch.arange(len(new) * width, dtype=torch.int32).flip(0).view(len(new), width)
    slots = [
        int(tables[row, p // block_size]) * block_size + p % block_size
        for row, (count, context) in enumerate(zip(new, contexts, strict=True))
        for p in range(context - count, context)
    ]
    return AttentionBatch(
        query_starts=torch.tensor(starts, dtype=torch.int32),
        context_lens=torch.tensor(contexts, dtype=torch.int32),
        block_tables=tables,
        slots=torch.tensor(slots),
        num_decodes=sum(count == 1 for count in new),
        query_starts_host=starts,
        context_lens_host=contexts,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_a_forward_pass_stays_within_the_bound_and_near_it(name: str, dtype: str) -> None:
    spec = read_model_spec({**MODELS[name], "dtype": dtype})
    model, batch = _decoder(spec), _batch([TOKENS], [TOKENS], 16)
    with torch.inference_mode(), AllocatedBytes() as memory:
        model(torch.zeros(TOKENS, dtype=torch.long), torch.arange(TOKENS), batch, NoAttention(16, torch.device("cpu")))
    bound = activation_bytes(spec, tokens=TOKENS, dtype=dtype)
    assert 0.6 * bound <= memory.peak <= bound


@pytest.mark.parametrize("rows", ["one prefill chunk", "decodes"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_attention_stays_within_the_bound(name: str, rows: str) -> None:
    spec = read_model_spec({**MODELS[name], "dtype": "float32"})
    contexts, new = ([1000], [400]) if rows == "one prefill chunk" else ([900, 1000, 990, 500], [1] * 4)
    batch = _batch(contexts, new, 16)
    layer = spec.layers[-1]
    shape = AttentionShape(spec.num_heads, spec.num_kv_heads, spec.head_dim, 1.0, layer.window, spec.attention_softcap)
    attention = ReferenceAttention(16, torch.device("cpu"))
    attention.allocate(1, batch.block_tables.numel(), shape, torch.float32)
    q = torch.zeros(sum(new), spec.num_heads, spec.head_dim)
    k = torch.zeros(sum(new), spec.num_kv_heads, spec.head_dim)
    sinks = torch.zeros(spec.num_heads) if spec.attention_sinks else None
    with torch.inference_mode(), AllocatedBytes() as memory:
        attention.begin(batch)
        attention.attend(0, q, k, k, batch, shape, sinks)
    bound = attention_bytes(
        spec, in_place=False, tokens=sum(new), rows=len(new), max_len=1000, kv_tokens=sum(contexts), dtype="float32"
    )
    # The result counts with the activations.
    assert 0.2 * bound <= memory.peak - q.nbytes <= bound


METHODS = {
    "greedy": SamplingParams(temperature=0.0),
    "greedy with a penalty": SamplingParams(temperature=0.0, frequency_penalty=0.5),
    "any token": SamplingParams(),
    "min_p": SamplingParams(min_p=0.1),
    "small top_k": SamplingParams(top_k=20, top_p=0.9),
    "top_p": SamplingParams(top_p=0.9, repetition_penalty=1.1),
    "large top_k": SamplingParams(top_k=500, top_p=0.9, min_p=0.01, presence_penalty=0.5),
    "logprobs": SamplingParams(temperature=0.0, logprobs=5),
}


@pytest.mark.parametrize("name", METHODS)
def test_sampling_stays_within_the_bound(name: str) -> None:
    rows = 100
    spec = read_model_spec({**MODELS["llama"], "vocab_size": 4000, "dtype": "bfloat16"})
    sampler = Sampler(spec.vocab_size, "cpu", seed=0)
    states = [sampler.new_state(f"r{i}", METHODS[name], [1, 2, 3], 2) for i in range(rows)]
    logits = torch.randn(rows, spec.vocab_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    with AllocatedBytes() as memory:
        sampler.sample(logits, states, [3] * rows)
    assert memory.peak + logits.nbytes <= sampling_bytes(spec, rows=rows, dtype="bfloat16")
