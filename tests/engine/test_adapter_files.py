"""What adapters' files may hold: everything else is refused before it is used, naming the tensor or the field."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_for_tests import save_adapter
from models_for_tests import random_model, save
from safetensors.torch import load_file, save_file

from powerband.engine.lora.checkpoint import AdapterReader
from powerband.engine.lora.config import parse_adapter_config
from powerband.engine.lora.targets import adapter_targets
from powerband.engine.model_loader.checkpoint import _local_model, resolve_adapter
from powerband.errors import PowerbandError
from powerband.spec.model.reader import read_model_spec

TENSOR = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Edit = Callable[[dict[str, Any], dict[str, torch.Tensor]], None]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3")
    model = random_model("qwen3")
    save_adapter(model, folder / "adapter")
    save(model, folder / "model")
    return folder


def reader(good: Path, max_rank: int = 16) -> AdapterReader:
    targets = adapter_targets(read_model_spec(good / "model"))
    return AdapterReader(targets, max_rank=max_rank, dtype=torch.float32, device=torch.device("cpu"))


def edited(good: Path, folder: Path, edit: Edit) -> Path:
    """A copy of the good adapter with its configuration and tensors changed."""
    config = json.loads((good / "adapter" / "adapter_config.json").read_text())
    tensors = load_file(good / "adapter" / "adapter_model.safetensors")
    edit(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def error_of(good: Path, folder: Path, edit: Edit, **options: int) -> PowerbandError:
    with pytest.raises(PowerbandError) as caught:
        reader(good, **options).read(edited(good, folder, edit))
    return caught.value


def test_the_good_one_is_read(good: Path) -> None:
    weights = reader(good).read(good / "adapter")
    assert weights.rank == 4
    assert len(weights.deltas) == 3 * 4  # projections of three layers, q, k and v in one, gate and up in one


def test_its_digest_is_that_of_its_content(good: Path, tmp_path: Path) -> None:
    first = reader(good).read(good / "adapter").digest
    assert reader(good).read(edited(good, tmp_path, lambda c, t: c.update(base_model_name_or_path="x"))).digest == first
    assert reader(good).read(edited(good, tmp_path, lambda c, t: c.update(lora_alpha=9))).digest != first
    assert reader(good).read(edited(good, tmp_path, lambda c, t: t[TENSOR].mul_(2))).digest != first


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"peft_type": None}, "peft_type"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"use_qalora": True}, "use_qalora"),
        ({"use_something_new": True}, "use_something_new"),
        ({"a_new_config": {"x": 1}}, "a_new_config"),
        ({"r": "4"}, "'r'"),
        ({"r": 0}, "'r'"),
        ({"lora_alpha": float("inf")}, "lora_alpha"),
        ({"lora_alpha": "x"}, "lora_alpha"),
        ({"rank_pattern": {"q_proj": -1}}, "q_proj"),
        ({"rank_pattern": {"(?=q)x": 4}}, "(?=q)x"),
        ({"rank_pattern": [1]}, "rank_pattern"),
        ({"target_modules": [1]}, "target_modules"),
    ],
    ids=str,
)
def test_a_configuration_that_is_not_supported_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    values = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], **change}
    with pytest.raises(PowerbandError) as caught:
        parse_adapter_config(values, "adapter_config.json")
    assert named in caught.value.message
    assert (caught.value.code, caught.value.param) == ("bad_adapter", "lora")


@pytest.mark.parametrize(
    "change",
    [
        {"lora_dropout": 0.1, "task_type": "CAUSAL_LM", "megatron_core": "megatron.core", "loftq_config": {}},
        {"init_lora_weights": "gaussian", "use_dora": False, "modules_to_save": None, "bias": "none"},
        {"a_new_switch": False, "a_new_size": 16, "a_new_list": []},
        {"target_modules": r"(?:.*\bq_proj)"},  # not understood, and not needed
        {"target_modules": "all-linear", "fan_in_fan_out": True},
    ],
    ids=str,
)
def test_what_changes_nothing_is_taken(change: dict[str, Any]) -> None:
    parse_adapter_config({"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], **change}, "adapter_config.json")


def wrong_width(_config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors[TENSOR] = torch.zeros(4, 48)


def wrong_rank(_config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors[TENSOR] = torch.zeros(8, 64)


def further_layer(_config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    for part in "AB":
        name = TENSOR.replace("lora_A", f"lora_{part}")
        tensors[name.replace("layers.0", "layers.3")] = tensors[name].clone()


def fewer_layers(_config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "layers.2" in name]:
        del tensors[name]


def other_names(_config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    for part in "AB":
        name = TENSOR.replace("lora_A", f"lora_{part}")
        tensors[name.replace("q_proj", "qkv_proj")] = tensors.pop(name)


def half_a_pair(_config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    del tensors[TENSOR]


def not_a_number(_config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors[TENSOR][0, 0] = float("nan")


def whole_numbers(_config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors[TENSOR] = tensors[TENSOR].to(torch.int32)


def not_a_target(config: dict[str, Any], _tensors: dict[str, torch.Tensor]) -> None:
    config["target_modules"] = ["k_proj"]


def nothing(_config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors.clear()


def extra(name: str, *shape: int) -> Edit:
    def edit(_config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors["base_model.model." + name] = torch.zeros(*shape)

    return edit


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (wrong_width, [TENSOR, "[4, 48]", "[4, 64]"]),
        (wrong_rank, [TENSOR, "[8, 64]", "[4, 64]"]),
        (further_layer, ["layers.3", "3 layers"]),
        (fewer_layers, ["lacks", "layers.2"]),
        (other_names, ["qkv_proj", "no place"]),
        (half_a_pair, ["without", TENSOR]),
        (not_a_number, [TENSOR, "not finite"]),
        (whole_numbers, [TENSOR, "int32"]),
        (not_a_target, ["down_proj.lora_A", "target_modules"]),
        (nothing, ["no tensor"]),
        (extra("model.embed_tokens.lora_embedding_A", 4, 160), ["embed_tokens", "embedding"]),
        (extra("lm_head.lora_A.weight", 4, 64), ["lm_head", "head"]),
        (extra("model.layers.0.mlp.experts.0.up_proj.lora_A.weight", 4, 64), ["experts"]),
        (extra("model.layers.0.self_attn.q_proj.lora_magnitude_vector", 64), ["DoRA"]),
        (extra("model.layers.0.self_attn.q_proj.bias", 64), ["bias"]),
        (extra("score.weight", 2, 64), ["score.weight"]),
        (extra("vision_tower.layers.0.self_attn.q_proj.lora_A.weight", 4, 64), ["image encoder"]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_an_adapter_that_does_not_fit_is_refused_by_its_tensor(
    good: Path, tmp_path: Path, edit: Edit, named: list[str]
) -> None:
    error = error_of(good, tmp_path, edit)
    assert all(word in error.message for word in named), error.message
    assert error.code == "bad_adapter"


def test_too_large_a_rank_names_the_option(good: Path, tmp_path: Path) -> None:
    error = error_of(good, tmp_path, lambda c, t: None, max_rank=3)
    assert "rank 4; max_lora_rank is 3" in error.message
    assert "--max-lora-rank 4" in error.hint


def test_pickled_weights_are_never_loaded(good: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes((good / "adapter" / "adapter_config.json").read_bytes())
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(PowerbandError) as caught:
        reader(good).read(tmp_path)
    assert caught.value.code == "pickled_weights"


@pytest.mark.parametrize("name", ["/" + 300 * "x", 5000 * "x"])
def test_a_name_that_no_folder_can_have_is_refused(name: str) -> None:
    with pytest.raises(PowerbandError) as caught:
        resolve_adapter(name)
    assert caught.value.code == "adapter_not_found"
    with pytest.raises(PowerbandError) as caught:
        _local_model(name)
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_or_damaged_file_is_named(good: Path, tmp_path: Path, name: str) -> None:
    path = edited(good, tmp_path, lambda c, t: None) / name
    for content in (None, b"", b"\xff" * 100, path.read_bytes()[:60]):
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(PowerbandError) as caught:
            reader(good).read(tmp_path)
        assert name in caught.value.message


def test_patterns_decide_as_in_peft() -> None:
    from peft.utils.other import get_pattern_key

    ranks = {"q_proj": 2, "model.layers.1.mlp.up_proj": 3, r"layers\.[02]\.mlp\..*": 5, "^model.layers.2.*o_proj": 7}
    config = parse_adapter_config(
        {"peft_type": "LORA", "r": 4, "target_modules": "all-linear", "rank_pattern": ranks}, "adapter_config.json"
    )
    parts = ("self_attn.q_proj", "self_attn.o_proj", "self_attn.xq_proj", "mlp.up_proj", "mlp.down_proj")
    for module in [f"model.layers.{layer}.{part}" for layer in range(4) for part in parts]:
        assert config.rank_of(module) == ranks.get(get_pattern_key(ranks.keys(), module), 4), module


@pytest.mark.parametrize(
    "selection",
    [
        {"target_modules": ["q_proj", "mlp.up_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_to_transform": 2},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.0.mlp.up_proj"]},
        {"target_modules": r".*\.(q|up)_proj"},
        {"target_modules": r".*layers\.[12].*proj", "exclude_modules": r".*mlp.*"},
        {"target_modules": r"q_proj"},
    ],
    ids=str,
)
def test_modules_are_selected_as_in_peft(selection: dict[str, Any]) -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    theirs = LoraConfig(**selection)
    ours = parse_adapter_config({"peft_type": "LORA", **selection}, "adapter_config.json").targets
    parts = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")
    for module in [f"model.layers.{layer}.{part}" for layer in range(3) for part in parts]:
        found = check_target_module_exists(theirs, module)
        assert ours.selects(module) is (bool(found) and type(found).__name__ != "_ExcludedModule"), module


def test_hostile_expressions_take_bounded_time(good: Path, tmp_path: Path) -> None:
    """In Python's re, each of these runs for years on names that do not match."""
    for pattern in (r"(.*)*x", r"(a|a|.)*(a|.)*x", r"(.?){900}x", r"((.*)*)*q_projx"):

        def edit(config: dict[str, Any], _tensors: dict[str, torch.Tensor], pattern: str = pattern) -> None:
            config["target_modules"] = pattern

        assert "target_modules" in error_of(good, tmp_path, edit).message
