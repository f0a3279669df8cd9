"""The memory plan: its sums, its limits, its defaults, and what it says when something does not fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_configs import model_config
from powerband.cost import MemoryPlan, plan_memory
from powerband.errors import EnvironmentFault, UsageError
from powerband.spec import EngineSettings, ModelSpec, read_model_spec
from powerband.spec.checkpoint.quantization import WeightFormat

GIB = 1 << 30
KINDS: tuple[Literal["cpu", "cuda"], ...] = ("cpu", "cuda")

LLAMA_2_7B = read_model_spec(
    model_config(4096, 32, 32, 32, 11008, 32000, torch_dtype="float16", max_position_embeddings=4096)
)
QWEN_2_5_7B = read_model_spec(
    model_config(3584, 28, 28, 4, 18944, 152064, model_type="qwen2", max_position_embeddings=32768)
)
GPT_OSS_LIKE = read_model_spec(
    {
        "model_type": "gpt_oss",
        "hidden_size": 640,
        "intermediate_size": 640,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "num_local_experts": 8,
        "vocab_size": 20000,
        "torch_dtype": "bfloat16",
    }
)
MODELS = (LLAMA_2_7B, QWEN_2_5_7B, GPT_OSS_LIKE)


def _plan(spec: ModelSpec, memory: int, kind: Literal["cpu", "cuda"] = "cpu", **asked: Any) -> MemoryPlan:
    return plan_memory(spec, EngineSettings(**asked), memory, kind=kind)


@settings(max_examples=200)
@given(
    spec=st.sampled_from(MODELS),
    kind=st.sampled_from(KINDS),
    memory=st.integers(0, 200 * GIB),
    more=st.integers(0, 64 * GIB),
    max_num_seqs=st.integers(1, 2000),
    max_num_batched_tokens=st.integers(1, 20_000),
    block_size=st.sampled_from([1, 16, 32, 100]),
    max_model_len=st.none() | st.integers(1, 4096),
    dtype=st.sampled_from(["auto", "float32", "bfloat16"]),
    gpu_memory_utilization=st.floats(0.05, 1.0),
)
def test_parts_add_up_never_exceed_memory_and_grow_with_it(
    spec: ModelSpec, kind: Literal["cpu", "cuda"], memory: int, more: int, **asked: Any
) -> None:
    def plan(memory_bytes: int) -> MemoryPlan | None:
        try:
            return _plan(spec, memory_bytes, kind, **asked)
        except EnvironmentFault:
            return None

    small, large = plan(memory), plan(memory + more)
    if small is None:
        return
    assert sum(small.parts.values()) == small.total_bytes <= small.available_bytes <= memory
    assert all(size >= 0 for size in small.parts.values())
    assert 1 <= small.max_model_len <= min(small.kv_tokens, asked["max_model_len"] or spec.max_position)
    assert small.max_model_len == asked["max_model_len"] or asked["max_model_len"] is None
    assert large is not None
    assert large.num_blocks >= small.num_blocks
    assert large.max_model_len >= small.max_model_len


@settings(max_examples=100)
@given(memory=st.integers(16 * GIB, 400 * GIB), max_num_seqs=st.integers(1, 300))
def test_on_a_cpu_the_cache_takes_a_quarter_at_most_and_no_more_than_it_can_use(memory: int, max_num_seqs: int) -> None:
    plan = _plan(LLAMA_2_7B, memory, max_num_seqs=max_num_seqs)
    assert plan.parts["kv_cache"] <= memory / 4
    assert plan.kv_tokens <= max_num_seqs * 4096


def test_on_a_cpu_a_length_that_was_asked_for_comes_before_the_quarter() -> None:
    plan = _plan(LLAMA_2_7B, 17 * GIB, max_model_len=4096, max_num_seqs=1, max_num_batched_tokens=256)
    assert plan.max_model_len == plan.kv_tokens == 4096
    shorter = plan_memory(
        LLAMA_2_7B, EngineSettings(max_model_len=4096, max_num_seqs=1), 32 * GIB, kind="cpu", free_memory_bytes=17 * GIB
    )
    assert shorter.available_bytes < 17 * GIB
    assert shorter.kv_tokens == 4096


@pytest.mark.parametrize(
    ("spec", "kv_tokens_of_vllm"), [(LLAMA_2_7B, 119_408), (QWEN_2_5_7B, 1_045_888)], ids=["Llama-2-7B", "Qwen2.5-7B"]
)
def test_a_gpu_holds_about_as_many_tokens_as_vllm_reports(spec: ModelSpec, kv_tokens_of_vllm: int) -> None:
    # vLLM 0.15.1 on an H100 of 79.2 GiB at 0.9, 128 requests, 2048 tokens per step: figures of its start-up log, as
    # published in the inference-sim project's test data.
    plan = _plan(spec, int(79.2 * GIB), "cuda", max_num_seqs=128, max_num_batched_tokens=2048)
    assert plan.kv_tokens == pytest.approx(kv_tokens_of_vllm, rel=0.03)


def test_the_length_is_lowered_to_what_fits_and_the_plan_says_so() -> None:
    plan = _plan(QWEN_2_5_7B, 18 * GIB, "cuda")
    assert plan.max_model_len == plan.kv_tokens < 32768
    assert plan.notes == (
        f"max_model_len is {plan.kv_tokens}, as much as the KV cache holds; "
        "the model's own 32768 would need 1.75 GiB of KV cache",
    )
    assert f"note: {plan.notes[0]}" in plan.table()


def test_kv_cache_memory_overrides_the_default() -> None:
    plan = _plan(QWEN_2_5_7B, 64 * GIB, kv_cache_memory="512MiB", block_size=16)
    assert plan.num_blocks == 512 * 2**20 // (16 * 57344)
    assert plan.max_model_len == plan.kv_tokens == 9360
    assert "would need --kv-cache-memory 1792MiB" in plan.notes[0]


def test_a_length_that_does_not_fit_is_refused_with_three_ways_out_in_numbers() -> None:
    with pytest.raises(EnvironmentFault) as caught:
        _plan(QWEN_2_5_7B, 18 * GIB, "cuda", max_model_len=32768)
    fault = caught.value
    assert (fault.exit_code, fault.code, fault.param) == (3, "memory_plan", "max_model_len")
    assert "weights 14.19 GiB" in fault.message
    assert "a request of 32768 tokens needs 1.75 GiB" in fault.message
    assert all(f"({i}) " in fault.hint for i in (1, 2, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_the_ways_out_lead_out(kind: Literal["cpu", "cuda"]) -> None:
    asked: dict[str, Any] = {"max_model_len": 32768, "max_num_seqs": 64}
    memory = int(18.4 * GIB) if kind == "cuda" else 18 * GIB
    with pytest.raises(EnvironmentFault) as caught:
        _plan(QWEN_2_5_7B, memory, kind, **asked)
    words = caught.value.hint.split()
    longest = int(words[words.index("--max-model-len") + 1])
    assert _plan(QWEN_2_5_7B, memory, kind, **{**asked, "max_model_len": longest}).max_model_len == longest
    with pytest.raises(EnvironmentFault):
        _plan(QWEN_2_5_7B, memory, kind, **{**asked, "max_model_len": longest + 64})
    if kind == "cuda":
        share = float(words[words.index("--gpu-memory-utilization") + 1])
        assert _plan(QWEN_2_5_7B, memory, kind, gpu_memory_utilization=share, **asked).max_model_len == 32768


def test_kv_cache_memory_that_is_too_small_or_too_large_names_the_right_amount() -> None:
    with pytest.raises(EnvironmentFault, match=r"--kv-cache-memory 1792MiB holds 32768 tokens"):
        _plan(QWEN_2_5_7B, 64 * GIB, kv_cache_memory="1GiB", max_model_len=32768)
    _plan(QWEN_2_5_7B, 64 * GIB, kv_cache_memory="1792MiB", max_model_len=32768)
    with pytest.raises(EnvironmentFault, match="kv_cache_memory asks for 60") as caught:
        _plan(QWEN_2_5_7B, 64 * GIB, kv_cache_memory="60GiB")
    words = caught.value.hint.split()
    most = words[words.index("--kv-cache-memory") + 1]
    assert _plan(QWEN_2_5_7B, 64 * GIB, kv_cache_memory=most).total_bytes > 0.99 * 0.95 * 64 * GIB


def test_a_model_that_is_too_large_is_told_how_large_a_device_or_model_would_do() -> None:
    with pytest.raises(EnvironmentFault) as caught:
        _plan(QWEN_2_5_7B, 8 * GIB)
    assert "weights 14.19 GiB" in caught.value.message
    assert "exceed the 7.60 GiB available" in caught.value.message
    assert "of free memory (here 8.00 GiB) holds it all" in caught.value.hint
    assert "a model of less than 3.3 billion parameters fits in bfloat16" in caught.value.hint


def test_more_positions_than_the_model_knows_are_a_mistake() -> None:
    with pytest.raises(UsageError, match="max_model_len is 5000, but the model knows only 4096 positions"):
        _plan(LLAMA_2_7B, 64 * GIB, max_model_len=5000)


def test_the_table_shows_predicted_beside_measured() -> None:
    plan = _plan(LLAMA_2_7B, 80 * GIB, "cuda", kv_cache_memory="16GiB")
    table = plan.table({"weights": 13 * GIB, "total": 30 * GIB})
    lines = [line.split() for line in table.splitlines()]
    assert lines[0] == ["memory", "(cuda,", "float16)", "predicted", "measured"]
    assert lines[1] == ["weights", "12.55", "GiB", "13.00", "GiB"]
    assert lines[2] == ["KV", "cache", "(1024", "blocks,", "32768", "tokens)", "16.00", "GiB", "-"]
    assert lines[-1][:4] == ["available", "of", "80.00", "GiB"]
    assert len({len(line) for line in table.splitlines()}) == 1
    assert "measured" not in plan.table()


def test_the_plan_as_json_names_every_part() -> None:
    plan = _plan(GPT_OSS_LIKE, 8 * GIB)
    report = plan.as_dict()
    assert report["total_bytes"] == sum(report[f"{name}_bytes"] for name in plan.parts)
    full, windowed = report["kv_layout"]["full"], report["kv_layout"]["windowed"]
    assert report["kv_tokens"] == plan.kv_tokens
    assert report["kv_tokens"] > 1.5 * report["num_blocks"] * report["block_size"] / (full + windowed)
    plain = _plan(LLAMA_2_7B, 80 * GIB).as_dict()
    assert plain["kv_tokens"] == plain["num_blocks"] * plain["block_size"]


def test_quantized_weights_and_cache_take_what_they_hold() -> None:
    """Qwen2.5-7B: 6.53e9 elements in projections, 0.545e9 in the head, as many in the embedding."""
    plain, eight, four = (_plan(QWEN_2_5_7B, 80 * GIB, quantization=name) for name in ("none", "int8", "int4"))
    projections = 28 * (3584 * (3584 + 2 * 512) + 3584 * 3584 + 3 * 3584 * 18944)
    head, outputs = 152064 * 3584, 28 * (3584 + 2 * 512 + 3584 + 2 * 18944 + 3584)
    rest = plain.parts["weights"] - 2 * projections - 2 * head
    assert eight.parts["weights"] == projections + 4 * outputs + head + 4 * 152064 + rest
    assert four.parts["weights"] == projections // 2 + projections // 128 * 4 + head + 4 * 152064 + rest
    kept = _plan(QWEN_2_5_7B, 80 * GIB, quantization="int4", quantize_head=False)
    assert kept.parts["weights"] - four.parts["weights"] == head - 4 * 152064
    assert four.table().splitlines()[0].split()[:4] == ["memory", "(cpu,", "bfloat16,", "weights"]
    assert kept.precisions() == ["bfloat16", "weights int4", "KV int8"]
    assert _plan(QWEN_2_5_7B, 80 * GIB, quantization="int4", kv_cache_dtype="bfloat16").kv_dtype == "bfloat16"
    assert _plan(QWEN_2_5_7B, 80 * GIB, quantization="int4", attention_backend="reference").kv_dtype == "bfloat16"
    tokens = _plan(QWEN_2_5_7B, 80 * GIB, kv_cache_memory="1GiB", kv_cache_dtype="int8").kv_tokens
    assert tokens == GIB // (28 * 2 * 4 * (128 + 4)) // 32 * 32


def test_a_tied_head_that_is_quantized_takes_memory_of_its_own() -> None:
    tied = replace(QWEN_2_5_7B, tie_embeddings=True)
    extra = _plan(tied, 80 * GIB, quantization="int8").parts["weights"]
    without = _plan(tied, 80 * GIB, quantization="int8", quantize_head=False).parts["weights"]
    assert extra - without == 152064 * (3584 + 4)


def test_a_model_that_is_too_large_may_fit_when_quantized() -> None:
    with pytest.raises(EnvironmentFault) as caught:
        _plan(QWEN_2_5_7B, 12 * GIB, max_model_len=64, max_num_seqs=8)
    assert "--quantization int8 frees" in caught.value.hint
    _plan(QWEN_2_5_7B, 12 * GIB, quantization="int8", max_model_len=64, max_num_seqs=8)


@pytest.mark.parametrize(
    ("kind", "asked", "sentence"),
    [
        ("cuda", {"quantization": "int8"}, "CPU only so far"),
        ("cpu", {"quantization": "int4", "dtype": "float16"}, "activations in bfloat16"),
        ("cpu", {"quantize_head": False}, "nothing is quantized"),
    ],
)
def test_precisions_that_cannot_be(kind: Literal["cpu", "cuda"], asked: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        _plan(QWEN_2_5_7B, 80 * GIB, kind, **asked)


def test_a_quantized_checkpoint_is_planned_as_it_is_stored() -> None:
    stored = WeightFormat("awq", 4, 128, symmetric=False)
    spec = replace(QWEN_2_5_7B, weight_format=stored)
    asymmetric = _plan(spec, 80 * GIB)
    assert asymmetric.precisions() == ["bfloat16", "weights int4", "head int8", "KV int8"]
    assert asymmetric.parts["weights"] > _plan(QWEN_2_5_7B, 80 * GIB, quantization="int4").parts["weights"]
    with pytest.raises(UsageError, match="quantized already: awq, 4 bits"):
        _plan(spec, 80 * GIB, quantization="int8")


@pytest.mark.parametrize(
    "asked",
    [
        {"max_num_seqs": 16},
        {"max_num_batched_tokens": 256},
        {"block_size": 16},
        {"enforce_eager": True},
        {"gpu_memory_utilization": 0.8},
        {"kv_cache_memory": "1GiB"},
        {"dtype": "float32"},
        {"attention_backend": "reference"},
    ],
    ids=str,
)
def test_every_setting_that_concerns_memory_changes_the_plan(asked: dict[str, Any]) -> None:
    assert _plan(QWEN_2_5_7B, 80 * GIB, "cuda", **asked) != _plan(QWEN_2_5_7B, 80 * GIB, "cuda")
