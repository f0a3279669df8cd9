"""Reading `quantization_config`: what published checkpoints say, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from published_configs import LLAMA_3_1_8B

from powerband.errors import UsageError
from powerband.spec import read_model_spec
from powerband.spec.checkpoint.quantization import WeightFormat

# As in the checkpoints' config.json: Qwen2.5-7B-Instruct-GPTQ-Int4 and -AWQ, and what llm-compressor 0.4 writes.
GPTQ = {
    **{"batch_size": 1, "bits": 4, "block_name_to_quantize": None, "cache_block_outputs": True, "damp_percent": 0.01},
    **{"dataset": None, "desc_act": False, "exllama_config": {"version": 1}, "group_size": 128, "model_seqlen": None},
    **{"quant_method": "gptq", "sym": True, "tokenizer": None, "true_sequential": True, "use_cuda_fp16": False},
}
AWQ = {"bits": 4, "group_size": 128, "modules_to_not_convert": None, "quant_method": "awq", "version": "gemm"}
AWQ |= {"zero_point": True}
INT8_WEIGHTS = {
    **{"actorder": None, "block_structure": None, "dynamic": False, "group_size": None, "num_bits": 8},
    **{"observer": "minmax", "observer_kwargs": {}, "strategy": "channel", "symmetric": True, "type": "int"},
}
W8A8 = {
    "config_groups": {
        "group_0": {
            "input_activations": {**INT8_WEIGHTS, "dynamic": True, "strategy": "token"},
            "output_activations": None,
            "targets": ["Linear"],
            "weights": INT8_WEIGHTS,
        }
    },
    **{"format": "int-quantized", "global_compression_ratio": 1.5, "ignore": ["lm_head"], "kv_cache_scheme": None},
    **{"quant_method": "compressed-tensors", "quantization_status": "compressed"},
}


def w4a16(**weights: Any) -> dict[str, Any]:
    changed = {**INT8_WEIGHTS, "num_bits": 4, "strategy": "group", "group_size": 128, **weights}
    group = {"targets": ["Linear"], "weights": changed, "input_activations": None}
    return {**W8A8, "format": "pack-quantized", "config_groups": {"group_0": group}}


def stored(configuration: dict[str, Any], key: str = "quantization_config") -> WeightFormat | None:
    return read_model_spec({**LLAMA_3_1_8B, key: configuration}).weight_format


@pytest.mark.parametrize(
    ("configuration", "expected"),
    [
        (GPTQ, WeightFormat("gptq", 4, 128, True, zeros_minus_one=True)),
        ({**GPTQ, "checkpoint_format": "gptq_v2", "sym": False}, WeightFormat("gptq", 4, 128, False)),
        (
            {**GPTQ, "desc_act": True, "group_size": -1, "bits": 8, "lm_head": True},
            WeightFormat("gptq", 8, 0, True, zeros_minus_one=True, ordered=True, head=True),
        ),
        (AWQ, WeightFormat("awq", 4, 128, False)),
        (W8A8, WeightFormat("compressed-tensors", 8, 0, True, packed=False, ignored=("lm_head",))),
        (w4a16(symmetric=False), WeightFormat("compressed-tensors", 4, 128, False, ignored=("lm_head",))),
        (
            {**w4a16(actorder="group"), "ignore": ["re:.*down_proj$"]},
            WeightFormat("compressed-tensors", 4, 128, True, ordered=True, head=True, ignored=("re:.*down_proj$",)),
        ),
    ],
)
def test_formats(configuration: dict[str, Any], expected: WeightFormat) -> None:
    assert stored(configuration) == expected
    assert stored(configuration, "compression_config") == expected


@pytest.mark.parametrize(
    ("configuration", "named"),
    [
        ({**GPTQ, "bits": 3}, "GPTQ with 3 bits"),
        ({**GPTQ, "is_marlin_format": True}, "repacked for 'marlin'"),
        ({**GPTQ, "checkpoint_format": "bitblas"}, "repacked for 'bitblas'"),
        ({**GPTQ, "dynamic": {"-:.*down.*": {}}}, "different bits or groups"),
        ({**AWQ, "version": "gemv"}, "layout 'gemv'"),
        ({**AWQ, "version": None, "format": "gemv"}, "layout 'gemv'"),
        ({**AWQ, "version": None, "checkpoint_format": "gemv_fast"}, "layout 'gemv_fast'"),
        ({**AWQ, "backend": "llm-awq"}, "layout 'llm-awq'"),
        ({**AWQ, "bits": 8}, "AWQ with 8 bits"),
        ({**W8A8, "format": "float-quantized"}, "format 'float-quantized'"),
        ({**W8A8, "config_groups": {"a": {}, "b": {}}}, "2 groups of modules"),
        (w4a16(type="float"), "weights of type 'float'"),
        (w4a16(num_bits=2), "compressed-tensors with 2 bits"),
        (w4a16(strategy="block"), "one scale per 'block'"),
        ({**W8A8, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights"),
        ({**W8A8, "transform_config": {"config_groups": {"u": {"type": "hadamard"}}}}, "rotated weights"),
    ],
)
def test_what_cannot_be_loaded_is_named(configuration: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named) as caught:
        stored(configuration)
    assert caught.value.code == "unsupported_quantization"
    assert "--quantization int8" in caught.value.hint


def test_unknown_methods_are_left_to_the_loader() -> None:
    spec = read_model_spec({**LLAMA_3_1_8B, "quantization_config": {"quant_method": "hqq"}})
    assert (spec.quantization, spec.weight_format) == ("hqq", None)


@pytest.mark.parametrize(
    ("pattern", "module", "ignored"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "model.layers.0.mlp.lm_head_2", False),
        ("gate", "model.layers.3.mlp.gate", True),
        ("re:.*down_proj$", "model.layers.0.mlp.down_proj", True),
        ("re:.*down_proj$", "model.layers.0.mlp.down_proj.other", False),
        ("re:model\\.layers\\.0\\..*", "model.layers.0.mlp.up_proj", True),
        ("re:model\\.layers\\.0\\..*", "model.layers.10.mlp.up_proj", False),
        ("re:" + ".*a" * 1000 + "$", "a" * 3000 + "b", False),
    ],
)
def test_ignored_modules(pattern: str, module: str, ignored: bool) -> None:
    assert WeightFormat("awq", 4, 128, True, ignored=(pattern,)).stores(module) is not ignored
