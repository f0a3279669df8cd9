"""Lists of modules in configurations: expressions mean what Python's `re` means by them, in linear time."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from powerband.errors import UsageError
from powerband.spec.checkpoint.module_patterns import ModulePatterns
from powerband.spec.checkpoint.quantized_modules import QuantizedModules, read_quantized_modules

ATOMS = ("a", "b", ".", r"\.", "[ab]", "[^a]", "[a-c]", "(a|b.)", "(?:ab|c)", r"\d", r"\w", "7")
EXPRESSIONS = st.lists(
    st.tuples(st.sampled_from(ATOMS), st.sampled_from(("", "*", "+", "?", "{2}", "{1,2}", "{1,}", "*?"))), max_size=6
).map(lambda parts: "".join(atom + sign for atom, sign in parts))


@given(first=EXPRESSIONS, second=EXPRESSIONS, end=st.sampled_from(("", "$")), text=st.text("ab.c7", max_size=10))
def test_expressions_match_as_pythons(first: str, second: str, end: str, text: str) -> None:
    pattern = f"^({first}|{second}){end}"
    assert ModulePatterns([f"re:{pattern}"]).match(text) == bool(re.match(pattern, text))


@pytest.mark.parametrize(
    ("pattern", "module", "is_named"),
    [
        ("lm_head", "lm_head", True),
        ("self_attn", "model.layers.3.self_attn.q_proj", True),
        ("gate", "model.layers.3.mlp.gate_proj", False),
        ("model.layers.1", "model.layers.10.mlp.up_proj", False),
        ("model.layers.*.self_attn", "model.layers.7.self_attn.o_proj", True),  # as gpt-oss lists them
        ("model.layers.0.self_attn*", "model.layers.0.self_attn.k_proj", True),  # as ModelOpt does
        ("*lm_head*", "lm_head", True),
        ("model.layers.*.mlp.gate", "model.layers.7.mlp.gate_proj", False),
        ("re:.*mlp.gate$", "model.layers.0.mlp.gate", True),  # as llm-compressor does
        ("re:.*mlp.gate$", "model.layers.0.mlp.gate_proj", False),
        (r"re:model\.layers\.(0|1|125)\..*(q|k)_proj", "model.layers.125.self_attn.k_proj", True),
        (r"re:model\.layers\.(0|1|125)\..*(q|k)_proj", "model.layers.12.self_attn.k_proj", False),
    ],
)
def test_what_the_tools_write(pattern: str, module: str, is_named: bool) -> None:
    assert ModulePatterns([pattern]).match(module) is is_named


@pytest.mark.parametrize("pattern", ["re:(a+)+$", "re:(a|aa)*$", "re:" + "a?" * 300 + "a{300}$"])
def test_no_expression_takes_long(pattern: str) -> None:
    started_s = time.process_time()
    assert not ModulePatterns([pattern]).match("a" * 299 + "b")
    assert time.process_time() - started_s < 5


@pytest.mark.parametrize(
    "pattern",
    [
        "re:(?!x)y",
        "re:(a",
        "re:a)",
        "re:*",
        "re:[a",
        "re:a{",
        "re:a{9999}{9999}",
        "re:" + "(" * 500,
        r"re:\bx",
        "re:a**",
    ],
)
def test_an_expression_that_is_not_understood_is_named(pattern: str) -> None:
    with pytest.raises(UsageError, match="not understood") as caught:
        ModulePatterns([pattern])
    assert caught.value.code == "unsupported_quantization"


def test_too_many_patterns_are_refused() -> None:
    with pytest.raises(UsageError, match="10001 modules"):
        ModulePatterns(f"m{i}" for i in range(10_001))
    with pytest.raises(UsageError, match="1001 of them"):
        ModulePatterns(f"re:m{i}" for i in range(1001))


@pytest.mark.parametrize(
    ("method", "table", "found"),
    [
        ("fp8", {"weight_block_size": [128, 64]}, QuantizedModules(block_outputs=128, block_inputs=64)),
        ("fp8", {"activation_scheme": "dynamic", "ignored_layers": ["x"]}, QuantizedModules(ignored=("x",))),
        ("fbgemm_fp8", {"modules_to_not_convert": ["a", "a"]}, QuantizedModules(ignored=("a",))),
        ("awq", {"bits": 4, "group_size": 64}, QuantizedModules(block_outputs=8, block_inputs=64)),
        ("awq", {"w_bit": 4, "q_group_size": 128}, QuantizedModules(block_outputs=8, block_inputs=128)),
        ("gptq", {"bits": 8, "group_size": -1, "lm_head": True}, QuantizedModules(head=True, block_outputs=4)),
        (
            "gptq",
            {"bits": 4, "group_size": 32, "dynamic": {r"-:.*\.gate$": {}, "+:x": {"bits": 8}}},
            QuantizedModules(ignored=(r"re:.*\.gate$",), block_outputs=8, block_inputs=32),
        ),
        (
            "gptq",
            {"bits": 4, "group_size": 128, "modules_in_block_to_quantize": [["mlp.up_proj"], ["mlp.down_proj"]]},
            QuantizedModules(only=("mlp.up_proj", "mlp.down_proj"), block_outputs=8, block_inputs=128),
        ),
        (
            "compressed-tensors",
            {"config_groups": {"g": {"targets": ["Linear"], "weights": {"strategy": "group", "group_size": 32}}}},
            QuantizedModules(head=True, block_inputs=32),
        ),
        (
            "compressed-tensors",
            {
                "config_groups": {"g": {"weights": {"strategy": "block", "block_structure": "128x128"}}},
                "ignore": ["lm_head"],
            },
            QuantizedModules(ignored=("lm_head",), block_outputs=128, block_inputs=128),
        ),
        (
            "modelopt",
            {"quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head", "model.layers.0*"]}},
            QuantizedModules(ignored=("lm_head", "model.layers.0*"), block_inputs=16),
        ),
        ("mxfp4", {}, QuantizedModules()),
    ],
)
def test_what_configurations_say_of_their_scales(
    method: str, table: dict[str, object], found: QuantizedModules
) -> None:
    assert read_quantized_modules(table, method) == found


@pytest.mark.parametrize(
    "table", [{"weight_block_size": 128}, {"weight_block_size": ["x", 1]}, {"ignored_layers": "x"}]
)
def test_a_wrong_value_is_named(table: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="quantization_config: '"):
        read_quantized_modules(table, "fp8")
