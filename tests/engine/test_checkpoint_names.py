"""Names, left-over tensors and files as training and conversion tools write them, loaded as transformers does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoint_formats import awq, gptq, write
from engines_for_tests import TestEngine
from models_for_tests import FAMILIES, healthy_model, random_model, save
from safetensors.torch import load_file, save_file

from powerband.errors import PowerbandError, UsageError
from powerband.spec.checkpoint.files import tensor_names, weight_files
from powerband.spec.checkpoint.quantization import WeightFormat
from powerband.spec.model.checkpoint_precision import read_for_planning
from powerband.spec.model.reader import read_model_spec

PROMPT = [5, 17, 99, 42, 7, 7, 130, 1]
Tensors = dict[str, torch.Tensor]


def output_of(folder: Path) -> list[int]:
    with TestEngine(folder) as engine:
        return engine.generate([PROMPT])[0]


def stored(folder: Path) -> Tensors:
    return {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}


def store(folder: Path, tensors: Tensors, file: str = "model.safetensors") -> None:
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / file)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    model, oracle = healthy_model("llama2", [PROMPT])
    return save(model, tmp_path_factory.mktemp("llama")), oracle.continuations[0][:8]


@pytest.fixture
def checkpoint(untied: tuple[Path, list[int]], tmp_path: Path) -> tuple[Path, list[int]]:
    """A copy that a test may change, and what it says."""
    for file in untied[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path, untied[1]


# ---- names


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_model_saved_without_its_prefix(family: str, tmp_path: Path) -> None:
    folder = save(random_model(family), tmp_path)
    expected = output_of(folder)
    store(folder, {name.removeprefix("model."): tensor for name, tensor in stored(folder).items()})
    assert output_of(folder) == expected


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "base_model.model.", "language_model.", "model.", "module._orig_mod."]
)
def test_prefixes_of_trainers(prefix: str, checkpoint: tuple[Path, list[int]]) -> None:
    folder, expected = checkpoint
    store(folder, {prefix + name: tensor for name, tensor in stored(folder).items()})
    assert output_of(folder) == expected


@pytest.mark.parametrize("wrapper", ["_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"])
def test_wrappers_around_layers(wrapper: str, checkpoint: tuple[Path, list[int]]) -> None:
    folder, expected = checkpoint
    store(folder, {name.replace("layers.1.", f"layers.1.{wrapper}."): t for name, t in stored(folder).items()})
    assert output_of(folder) == expected


def test_one_tensor_under_two_names_is_refused() -> None:
    names = ["model.embed_tokens.weight", "model.layers.0.x", "_orig_mod.model.layers.0.x"]
    with pytest.raises(UsageError, match=r"_orig_mod\.model\.layers\.0\.x and model\.layers\.0\.x are both"):
        tensor_names(names)


# ---- what nothing is computed with


def left_over() -> dict[str, Tensors]:
    one, attention = torch.ones(1), "model.layers.1.self_attn."
    return {
        "rotations": {f"{attention}rotary_emb.inv_freq": torch.ones(8), f"{attention}rotary_emb.cos_cached": one},
        "causal masks": {f"{attention}bias": torch.ones(1, 1, 4, 4), f"{attention}masked_bias": torch.tensor(-1e4)},
        "a value head": {"v_head.summary.weight": torch.ones(1, 64), "v_head.summary.bias": one},
        "a classifier": {"score.weight": torch.ones(2, 64)},
        "scales of an 8-bit cache": {f"{attention}k_scale": one, f"{attention}v_scale": one},
        "scales at projections": {f"{attention}k_proj.output_scale": one, f"{attention}attn.v_scale": one},
        "scales of attention in 8 bits": {f"{attention}q_scale": one, f"{attention}prob_output_scale": one},
        "a layer more": {"model.layers.3.input_layernorm.weight": torch.ones(64), "model.layers.3.eh_proj.weight": one},
        "biases of zeros": {f"{attention}o_proj.bias": torch.zeros(64), "lm_head.bias": torch.zeros(160)},
        "an image encoder": {"vision_tower.encoder.layers.0.self_attn.q_proj.weight": one},
    }


@pytest.mark.parametrize("kind", left_over())
def test_what_nothing_is_computed_with_is_left_out(kind: str, checkpoint: tuple[Path, list[int]]) -> None:
    folder, expected = checkpoint
    store(folder, stored(folder) | left_over()[kind])
    assert output_of(folder) == expected


def test_a_value_head_beside_a_base_model_without_prefix(tmp_path: Path) -> None:
    folder = save(random_model("qwen3"), tmp_path)
    expected = output_of(folder)
    bare = {name.removeprefix("model."): tensor for name, tensor in stored(folder).items()}
    store(folder, bare | {"v_head.summary.weight": torch.ones(1, 64)})
    assert output_of(folder) == expected


MEANT = [f"model.layers.1.{name}" for name in ("self_attn.o_proj.bias", "self_attn.q_norm.weight")]
MEANT += ["model.layers.0.mlp.up_proj.lora_A.weight", "model.embed_norm.weight", "lm_head.bias"]


@pytest.mark.parametrize("name", MEANT)
def test_what_the_model_was_meant_to_compute_with_is_refused_by_name_and_file(
    name: str, checkpoint: tuple[Path, list[int]]
) -> None:
    folder, _ = checkpoint
    store(folder, stored(folder) | {name: torch.ones(64)})
    with pytest.raises(UsageError, match=rf"holds {name} \(in model\.safetensors\)"):
        output_of(folder)


# ---- files


def test_a_stale_index_beside_the_whole_file_is_not_needed(checkpoint: tuple[Path, list[int]]) -> None:
    folder, expected = checkpoint
    index = {"weight_map": dict.fromkeys(stored(folder), "model-00001-of-00002.safetensors")}
    for text in (json.dumps(index), "{ not json"):
        (folder / "model.safetensors.index.json").write_text(text)
        assert output_of(folder) == expected


@pytest.mark.parametrize("first", [0, 1])
def test_shards_without_an_index(first: int, checkpoint: tuple[Path, list[int]]) -> None:
    folder, expected = checkpoint
    names = sorted(stored(folder))
    for number, inside in enumerate((names[::2], names[1::2]), first):
        store(folder, {name: stored(folder)[name] for name in inside}, f"part-{number:05}-of-00002.safetensors")
    (folder / "model.safetensors").unlink()
    store(folder, {"layers.0.attention.wk.weight": torch.ones(2)}, "consolidated.00.safetensors")
    store(folder, {"base_model.model.x": torch.ones(2)}, "adapter_model.safetensors")
    assert output_of(folder) == expected
    (folder / f"part-{1:05}-of-00002.safetensors").unlink()
    with pytest.raises(PowerbandError, match=r"lacks part-00001-of-00002\.safetensors"):
        weight_files(folder)


def test_a_tensor_in_two_files_is_refused(checkpoint: tuple[Path, list[int]]) -> None:
    folder, _ = checkpoint
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    store(folder, {"model.norm.weight": torch.ones(64)}, "b.safetensors")
    with pytest.raises(UsageError, match=r"model\.norm\.weight is in .*a\.safetensors and in .*b\.safetensors"):
        output_of(folder)


@pytest.mark.parametrize("name", ["consolidated.safetensors", "adapter_model.safetensors"])
def test_a_folder_with_nothing_else_says_what_it_holds(name: str, tmp_path: Path) -> None:
    store(tmp_path, {"x": torch.ones(1)}, name)
    with pytest.raises(PowerbandError, match=f"holds only {name}"):
        weight_files(tmp_path)


# ---- quantization said beside config.json

GPTQ = {"bits": 4, "group_size": 32, "desc_act": False, "sym": True, "damp_percent": 0.01, "model_name_or_path": None}
AWQ = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}


@pytest.mark.parametrize(
    ("file", "found", "writer"),
    [("quantize_config.json", GPTQ, gptq), ("quant_config.json", AWQ, awq), ("quantize_config.json", AWQ, awq)],
)
def test_older_tools_say_it_in_a_file_of_their_own(file: str, found: dict, writer, tmp_path: Path) -> None:  # type: ignore[no-untyped-def, type-arg]  # as in checkpoint_formats
    method = "gptq" if writer is gptq else "awq"
    usual = {"quant_method": method, "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "zero_point": True}
    write(tmp_path, random_model("qwen2"), writer, usual)
    with TestEngine(tmp_path, dtype="bfloat16") as engine:
        expected = engine.generate([PROMPT])[0]
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / file).write_text(json.dumps(found))
    format = read_model_spec(tmp_path).weight_format
    assert isinstance(format, WeightFormat)
    assert (format.method, format.bits, format.group_size) == (method, 4, 32)
    assert read_for_planning(tmp_path / "config.json")[1].quantization == "int4"
    with TestEngine(tmp_path, dtype="bfloat16") as engine:
        assert engine.generate([PROMPT])[0] == expected


def test_config_json_comes_first(tmp_path: Path) -> None:
    folder = save(random_model("qwen2"), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}}))
    (folder / "quantize_config.json").write_text(json.dumps(GPTQ))
    assert read_model_spec(folder).quantization == "mxfp4"
