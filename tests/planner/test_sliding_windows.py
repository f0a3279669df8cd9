"""KV caches of models with sliding windows: what vLLM, SGLang and our own engine keep, in plans and in simulations."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import NO_HOST, PlainModel, deployment, drawn, played

from model_configs import model_config
from powerband.cost.memory import plan_memory
from powerband.cost.replica_memory import engine_settings, kv_bytes_per_token, plan_replica
from powerband.spec.deployment import EngineName, Replica
from powerband.spec.hardware.catalog import load_catalog
from powerband.spec.kv_layout import KVLayout
from powerband.spec.model.model_spec import ModelSpec
from powerband.spec.model.reader import read_model_spec
from powerband.spec.workload.lengths import Fixed, Uniform

GEMMA_3_27B = read_model_spec(
    {
        "model_type": "gemma3_text",
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_hidden_layers": 62,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "sliding_window": 1024,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "query_pre_attn_scalar": 168,
        "torch_dtype": "bfloat16",
    }
)
GPT_OSS_120B = read_model_spec(
    {
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "vocab_size": 201088,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 18,
        "max_position_embeddings": 131072,
        "torch_dtype": "bfloat16",
    }
)
MISTRAL_7B = read_model_spec(model_config(model_type="mistral", sliding_window=4096, max_position_embeddings=32768))


def memory(spec: ModelSpec, device: str, engine: EngineName = "vllm", **more: Any) -> Any:
    replica = Replica(device=device, **{"max_model_len": 131072, **more})
    return plan_replica(spec, load_catalog().find(device), replica, engine)


def test_gemma_3_takes_as_much_of_a_long_request_as_vllm() -> None:
    """Published: 12.3 GB for 131,072 positions, where all layers in full would take 66.6 GB."""
    held = memory(GEMMA_3_27B, "H100")
    assert not held.problem
    layers_in_page = 10  # of 62, ten see everything: 52 with a window are in six groups of ten
    page = layers_in_page * 16 * 2 * 16 * 128 * 2
    assert held.parts["kv_cache"] == held.num_blocks * page
    assert (held.layout.full, held.layout.windowed, held.layout.blocks_before) == (1, 6, 64)
    needed = held.layout.max_pages(131072 // 16) * page
    assert needed == pytest.approx(12.3e9, rel=0.01)
    assert held.kv_tokens >= 131072


def test_gpt_oss_with_131072_positions_needs_one_h100() -> None:
    assert not memory(GPT_OSS_120B, "H100", quantization="mxfp4").problem
    layout = memory(GPT_OSS_120B, "H100", quantization="mxfp4").layout
    assert (layout.full, layout.windowed, layout.blocks_before) == (1, 1, 8)


def test_a_model_whose_layers_all_have_a_window_holds_long_requests_in_it() -> None:
    held = memory(MISTRAL_7B, "L4", max_model_len=32768)
    assert (held.layout.full, held.layout.windowed, held.layout.blocks_before) == (0, 1, 256)
    assert held.tokens_at(32768) > 5 * held.tokens_at(4096)


@pytest.mark.parametrize(
    ("engine", "device", "layers"),
    [("trtllm", "H100", 36), ("sglang", "H100", 18 + 0.8 * 18), ("vllm", "local", 36)],
)
def test_engines_that_keep_all_or_a_share_of_the_windows_positions_are_planned_so(
    engine: EngineName, device: str, layers: float
) -> None:
    profile = load_catalog().find("H100")
    if device == "local":
        profile = type(profile).from_dict({**profile.as_dict(), "kind": "cpu", "architecture": "cpu"})
    replica = Replica(device=device, quantization="mxfp4", max_model_len=8192)
    held = plan_replica(GPT_OSS_120B, profile, replica, engine)
    row = 2 * 8 * 64 * 2
    assert held.layout is None
    assert held.parts["kv_cache"] / held.kv_tokens == pytest.approx(layers * row, rel=1e-3)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("spec", [GEMMA_3_27B, GPT_OSS_120B, MISTRAL_7B], ids=["gemma", "gpt-oss", "mistral"])
def test_our_engine_is_planned_as_it_plans_itself(spec: ModelSpec, kind: Literal["cpu", "cuda"]) -> None:
    profile = replace(load_catalog().find("MI325X"), kind=kind)
    asked = Replica(device="MI325X", max_model_len=32768)
    held = plan_replica(spec, profile, asked, "powerband")
    printed = plan_memory(spec, engine_settings(spec, asked), profile.memory_bytes, kind=kind)
    assert (held.num_blocks, held.kv_tokens, held.layout) == (printed.num_blocks, printed.kv_tokens, printed.layout)
    row = 2 * spec.num_kv_heads * spec.head_dim * 2
    assert printed.parts["kv_cache"] < 0.6 * printed.kv_tokens * spec.num_layers * row  # what it took without windows


@pytest.mark.parametrize("tensor", [2, 4])
def test_ranks_share_the_heads_of_every_page(tensor: int) -> None:
    one, some = memory(GEMMA_3_27B, "H200"), memory(GEMMA_3_27B, "H200", tensor_parallel=tensor)
    assert one.layout == some.layout
    pages = some.num_blocks * (10 * 16 * 2 * 16 * 128 * 2) / tensor
    assert some.parts["kv_cache"] == pytest.approx(pages)


def test_without_windows_nothing_changes() -> None:
    spec = read_model_spec(model_config(max_position_embeddings=131072))
    held = memory(spec, "H100", max_model_len=8192)
    replica = Replica(device="H100", max_model_len=8192)
    assert held.layout is None
    assert held.kv_tokens == held.num_blocks * 16
    assert held.parts["kv_cache"] == held.kv_tokens * kv_bytes_per_token(spec, replica)


# ---- simulated

LAYOUT = KVLayout(16, 1, 1, 2, 33, 64)
WHERE = deployment(max_num_batched_tokens=64, max_num_seqs=64)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), num_pages=st.sampled_from([30, 60, 200, 2000]), overlapped=st.booleans())
def test_fast_forward_changes_nothing_with_windows(seed: int, num_pages: int, overlapped: bool) -> None:
    schedule = drawn(25, rate=8, prompt=Uniform(5, 140), output=Uniform(1, 120), seed=seed)
    model = PlainModel(context_s=1e-6, host=dataclasses.replace(NO_HOST, overlapped=overlapped))
    fast, slow = (
        played(schedule, WHERE, model=model, num_blocks=num_pages, layouts=[LAYOUT], fast_forward=fast)
        for fast in (True, False)
    )
    assert fast == slow


def test_more_requests_run_at_once_where_windows_are_kept_only() -> None:
    schedule = drawn(60, rate=200, prompt=Fixed(1000), output=Fixed(200))
    where, layout = deployment(max_num_batched_tokens=256), replace(LAYOUT, step_tokens=256)
    end_s = {}
    for name, layouts, num_blocks in (("all", [], 400), ("windows", [layout], 1200)):  # the same memory
        found = played(schedule, where, num_blocks=num_blocks, layouts=layouts)
        end_s[name] = max(record.chunk_times_s[-1] for record in found.records)
    assert end_s["windows"] < 0.7 * end_s["all"]
