"""Decodes through captured graphs equal decodes run directly. Without a GPU a "graph" is the same function again."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")

from powerband.engine.attention.base import AttentionBatch, AttentionShape
from powerband.engine.attention.triton import TritonAttention
from powerband.engine.executor.batch import Inputs
from powerband.engine.executor.cuda_graphs import DecodeGraphs
from powerband.engine.executor.warm_up import warm_up
from powerband.engine.layers.triton import use_fused_layers
from powerband.engine.model_loader.linear_methods import LinearMethodSelector
from powerband.engine.model_loader.weights import fill_random
from powerband.engine.models.decoder import Decoder
from powerband.spec.checkpoint.quantization import PLAIN
from powerband.spec.model.model_spec import LayerSpec, ModelSpec, RopeSpec

ROPE = RopeSpec(theta=10_000.0, rotary_dim=16)
SPEC = ModelSpec(
    family="qwen3",
    dtype="float32",
    vocab_size=50,
    hidden_size=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=48,
    max_position=64,
    norm_eps=1e-6,
    tie_embeddings=True,
    layers=(LayerSpec(window=None, rope=ROPE), LayerSpec(window=8, rope=ROPE)),
    attention_scale=0.25,
    qk_norm="head",
)
WITH_EXPERTS = replace(
    SPEC,
    layers=(LayerSpec(window=None, rope=ROPE, num_experts=4),) * 2,
    num_experts_per_token=2,
    expert_intermediate_size=24,
)
BLOCK_SIZE = 16


def run_again(function):
    """What stands in for capturing: results go to the same memory each time."""
    result = function()

    def replay():
        result.copy_(function())

    return replay, result


def new_model(device, spec=SPEC):
    model = Decoder(spec, max_positions=64, dtype=torch.float32, device=device)
    fill_random(LinearMethodSelector(model, PLAIN), seed=0)
    return model


@pytest.fixture(scope="module")
def model(device):
    return new_model(device)


def new_attention(device):
    attention = TritonAttention(BLOCK_SIZE, device)
    shape = AttentionShape(SPEC.num_heads, SPEC.num_kv_heads, SPEC.head_dim, SPEC.attention_scale)
    attention.allocate(SPEC.num_layers, 16, shape, torch.float32)
    return attention


def decodes(contexts, device):
    """One new token per row; row r owns blocks 4r to 4r + 3."""
    rows = len(contexts)
    tables = torch.arange(4 * rows, dtype=torch.int32).view(rows, 4)
    slots = [
        int(tables[row, (c - 1) // BLOCK_SIZE]) * BLOCK_SIZE + (c - 1) % BLOCK_SIZE for row, c in enumerate(contexts)
    ]
    batch = AttentionBatch(
        query_starts=torch.arange(rows + 1, dtype=torch.int32, device=device),
        context_lens=torch.tensor(contexts, dtype=torch.int32, device=device),
        block_tables=tables.to(device),
        slots=torch.tensor(slots, device=device),
        num_decodes=rows,
        query_starts_host=list(range(rows + 1)),
        context_lens_host=list(contexts),
    )
    token_ids = torch.tensor([(7 * c) % 50 for c in contexts], device=device)
    return Inputs(token_ids, torch.tensor([c - 1 for c in contexts], device=device), batch)


@torch.inference_mode()
def test_graphs_of_padded_batches_equal_running_directly(model, device):
    """Batches of 3, then 1, then 4 rows through graphs for 1, 2 and 4: what an earlier batch left does not show."""
    direct, graphed = new_attention(device), new_attention(device)
    graphs = DecodeGraphs(
        model,
        graphed,
        max_rows=4,
        max_model_len=64,
        block_size=BLOCK_SIZE,
        device=device,
        capture=None if device.type == "cuda" else run_again,
    )
    graphs.capture()
    for contexts in ([1, 1, 1], [2, 2, 2], [3], [4, 3, 3, 1], [5, 4]):
        inputs = decodes(contexts, device)
        expected = model(inputs.token_ids, inputs.positions, inputs.batch, direct)
        torch.testing.assert_close(graphs(inputs), expected, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(graphed._cache, direct._cache, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_graphs_read_the_tables_of_each_group_of_layers(model, device):
    """The layers share one cache, in blocks of their own: as two caches would have it."""
    direct, shared = new_attention(device), TritonAttention(BLOCK_SIZE, device)
    shape = AttentionShape(SPEC.num_heads, SPEC.num_kv_heads, SPEC.head_dim, SPEC.attention_scale)
    groups = SPEC.num_layers
    shared.allocate(1, 16 * groups, shape, torch.float32, [(group, 0) for group in range(groups)])
    graphs = DecodeGraphs(
        model,
        shared,
        max_rows=4,
        max_model_len=64,
        block_size=BLOCK_SIZE,
        groups=groups,
        device=device,
        capture=None if device.type == "cuda" else run_again,
    )
    graphs.capture()
    for contexts in ([1, 1, 1], [2, 2], [3], [4, 3, 1]):
        inputs = decodes(contexts, device)
        expected = model(inputs.token_ids, inputs.positions, inputs.batch, direct)
        batch = inputs.batch
        batch.others = tuple(
            replace(batch, block_tables=batch.block_tables + 16 * group, slots=batch.slots + 16 * group * BLOCK_SIZE)
            for group in range(1, groups)
        )
        torch.testing.assert_close(graphs(inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spec", [SPEC, WITH_EXPERTS], ids=["dense", "experts"])
@torch.inference_mode()
def test_a_decoder_with_fused_layers_equals_one_without(spec, device):
    plain, fused = new_model(device, spec), new_model(device, spec)
    use_fused_layers(fused)
    inputs = decodes([1, 1], device)
    hidden = [m(inputs.token_ids, inputs.positions, inputs.batch, new_attention(device)) for m in (fused, plain)]
    torch.testing.assert_close(hidden[0], hidden[1], atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_steps_with_chunks_or_too_many_rows_run_directly(model, device):
    captured = []

    def refuse(function):
        captured.append(function)
        return run_again(function)

    graphs = DecodeGraphs(
        model, new_attention(device), max_rows=2, max_model_len=64, block_size=BLOCK_SIZE, device=device, capture=refuse
    )
    graphs(decodes([1, 1, 1], device))
    chunk = decodes([1, 1], device)
    chunk.batch.num_decodes = 1
    graphs(chunk)
    assert not captured


def test_sizes_end_with_the_largest_batch(model, device):
    graphs = DecodeGraphs(
        model, new_attention(device), max_rows=20, max_model_len=64, block_size=16, device=device, capture=run_again
    )
    assert graphs.sizes == [1, 2, 4, 8, 16, 20]


def test_warming_up_leaves_the_cache_alone(model, device):
    attention = new_attention(device)
    kinds = []

    def forward(inputs):
        kinds.append((inputs.batch.num_decodes, inputs.batch.context_lens_host[0]))
        return model(inputs.token_ids, inputs.positions, inputs.batch, attention)

    warm_up(forward, max_model_len=64, block_size=BLOCK_SIZE, device=device)
    assert kinds == [(0, 8), (1, 1), (1, 64)]
    assert not any(cache.any() for layer in attention._cache for cache in layer)
