"""Memory that an engine needs beside weights and KV cache: upper bounds derived from how it computes a step.

All results in bytes. A step computes up to `tokens` new positions and samples up to `rows` of them. Layers run one
after another, so the largest counts once. tests/cost/test_footprint.py measures the engine against these bounds.
"""

from __future__ import annotations

from powerband.spec.model.counts import dtype_bytes, kv_bytes_per_token_per_layer
from powerband.spec.model.model_spec import ModelSpec
from powerband.spec.model.rope import rotary_rows

MIB = 1 << 20

# Measured on Linux with torch 2.13: an engine's process holds 240 MiB beside weights and KV cache. The rest is room for
# the API's process, tokenizers and request state.
_CPU_RUNTIME_BYTES = 512 * MIB
# Context, cuBLAS and Triton workspaces, fragments of the allocator; graphs keep buffers of their own.
_CUDA_RUNTIME_BYTES = 600 * MIB
_CUDA_GRAPH_BYTES = 300 * MIB

_INDEX_BYTES = 64  # token id, position, slot and the like, of one token
_QUERY_TILE = 256  # queries scored at once where scores are held in memory (soft cap, sinks)
_SAMPLING_TILE = 64  # rows that are sampled at once
_SAMPLING_BYTES = 4 + 4 + 4 + 8 + 3 * 8 + 4 + 4
_PADDING = 1.25  # decodes of similar length are padded to the longest of their group
_DECODE_SPLITS = 16  # parts of a long context that a decode attends to in parallel


def activation_bytes(spec: ModelSpec, *, tokens: int, dtype: str) -> int:
    """Peak of the intermediate values of one layer.

    alive throughout    residual and the part's input [hidden each], cos and sin of each kind of layer
    attention           qkv, and while rotating three copies of queries and keys; norms of them add their result
    dense MLP           gate and up [2 * intermediate], their product [intermediate]
    experts             rows sorted by expert, results and back: 4 * chosen * hidden, or 2 of them while one expert runs
    norms               two float32 copies where the family rounds late
    """
    size = dtype_bytes(dtype)
    hidden, queries, keys = spec.hidden_size, spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    ropes = {layer.rope for layer in spec.layers if layer.rope is not None}
    alive = (2 * hidden + sum(2 * rope.rotary_dim for rope in ropes)) * size + _INDEX_BYTES
    attention = (queries + 2 * keys + 3 * (queries + keys)) * size
    if spec.qk_norm != "none":
        attention += (queries + 2 * keys) * size
    parts = [attention]
    if any(layer.num_experts == 0 for layer in spec.layers):
        parts.append(3 * spec.intermediate_size * size)
    if any(layer.num_experts for layer in spec.layers):
        chosen = spec.num_experts_per_token * hidden
        inner = spec.expert_intermediate_size * (7 if spec.expert_activation == "gpt_oss" else 3)
        routing = max(layer.num_experts for layer in spec.layers) * (size + 4) + spec.num_experts_per_token * 40
        parts.append(max(4 * chosen, 2 * chosen + hidden + inner) * size + routing)
    if spec.norm_weight_offset or spec.family == "gpt_oss":
        heads = queries + keys if spec.qk_norm == "head" else 0
        parts += [8 * hidden + hidden * size, (queries + 2 * keys) * size + heads * (8 + size)]
    return tokens * (alive + max(parts))


def adapter_bytes(spec: ModelSpec, *, rank: int, dtype: str) -> int:
    """A LoRA adapter of all projections of attention and dense MLPs: A [rank, in] and B [out, rank]."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    attention = (3 * hidden + queries + 2 * keys) + (queries + hidden)
    mlp = (2 * hidden + 2 * inner) + (inner + hidden)
    num_dense = sum(layer.num_experts == 0 for layer in spec.layers)
    return rank * (spec.num_layers * attention + num_dense * mlp) * dtype_bytes(dtype)


def sampling_bytes(spec: ModelSpec, *, rows: int, dtype: str) -> int:
    """Logits of `rows` positions, twice (four times with a soft cap), and the working memory of sampling.

    Sampling works on a tile of rows at a time. The most that a method holds of each logit: its value, probability,
    sorted value, index and sums in float64 (the methods that sort), and a count for penalties.
    """
    copies = 4 if spec.logit_softcap is not None else 2
    logits = rows * spec.vocab_size * dtype_bytes(dtype) * copies
    return logits + min(rows, _SAMPLING_TILE) * (spec.vocab_size + 64) * _SAMPLING_BYTES


def attention_bytes(
    spec: ModelSpec, *, in_place: bool, tokens: int, rows: int, max_len: int, kv_tokens: int, dtype: str
) -> int:
    """Workspace of attention in one layer: the larger of one prefill chunk's and of all decodes together.

    In plain torch, a chunk of `tokens` behind a context of up to `max_len` reads its keys and values into one place
    and makes a mask, as bool and as bias; a soft cap or sinks hold the scores of a tile of queries in float32, four
    times. Decodes read the keys and values of their contexts, `kv_tokens` in all, and hold scores and weights.
    `in_place`: kernels read the cache where it is and keep a partial result of each split of each decode.
    """
    if spec.encoder is not None:
        # Padded queries, keys and values, what attention makes of them, and scores where they are held in memory.
        return tokens * round(_PADDING * (4 * spec.hidden_size + spec.num_heads * max_len) * dtype_bytes(dtype))
    if in_place:
        return rows * spec.num_heads * _DECODE_SPLITS * (spec.head_dim + 2) * 4
    size, per_token = dtype_bytes(dtype), kv_bytes_per_token_per_layer(spec, dtype)
    chunk = max_len * per_token + min(tokens, max_len) * max_len * (2 + size)
    if spec.attention_softcap is not None or spec.attention_sinks:
        chunk += spec.num_heads * min(_QUERY_TILE, tokens) * max_len * (4 * 4 + size)
    decodes = kv_tokens * (per_token + spec.num_heads * (4 + 4 + size))
    return max(chunk, round(decodes * _PADDING))


def runtime_bytes(spec: ModelSpec, *, kind: str, graphs: bool, max_len: int, dtype: str) -> int:
    """Process, libraries and device context, and the rotary tables: cos and sin of every position."""
    ropes = {layer.rope for layer in spec.layers if layer.rope is not None}
    tables = sum(2 * rotary_rows(rope, max_len) * rope.rotary_dim * dtype_bytes(dtype) for rope in ropes)
    if kind == "cuda":
        return _CUDA_RUNTIME_BYTES + (_CUDA_GRAPH_BYTES if graphs else 0) + tables
    return _CPU_RUNTIME_BYTES + tables
