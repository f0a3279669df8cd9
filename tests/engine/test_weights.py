"""Loading: the layouts that exist in the wild, and clear refusal of everything else."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines_for_tests import TestEngine
from models_for_tests import greedy, random_model, save
from safetensors.torch import load_file, save_file

from powerband.engine.layers.embedding import Embedding
from powerband.engine.linear.base import Linear
from powerband.engine.linear.bf16 import pack
from powerband.engine.linear.onednn import OneDnnProvider
from powerband.engine.model_loader.linear_methods import LinearMethodSelector
from powerband.engine.model_loader.weights import fill_random, load_weights, resolve_model
from powerband.engine.models.decoder import Decoder
from powerband.engine.models.gpt_oss import expand_mxfp4
from powerband.errors import EnvironmentFault, PowerbandError, UsageError
from powerband.spec.checkpoint.quantization import PLAIN
from powerband.spec.model.reader import read_model_spec
from powerband.spec.settings import EngineSettings

PROMPT = [5, 17, 99, 42, 7, 7, 130, 1]


def products_for(folder: Path) -> LinearMethodSelector:
    model = Decoder(read_model_spec(folder), max_positions=64, dtype=torch.float32, device=torch.device("cpu"))
    return LinearMethodSelector(model, PLAIN)


def output_of(folder: Path) -> list[int]:
    with TestEngine(folder) as engine:
        return engine.generate([PROMPT])[0]


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    model = random_model("qwen3", tie_word_embeddings=False)
    return save(model, tmp_path_factory.mktemp("qwen3")), greedy(model, [PROMPT], 8)[0][0]


def copy_with(folder: Path, target: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """The same model with other tensors."""
    target.mkdir(exist_ok=True)
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")
    return target


# ---- what loads


def test_sharded_checkpoint(tmp_path: Path, qwen3: tuple[Path, list[int]]) -> None:
    folder, expected = qwen3
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, inside in halves.items():
        save_file({name: tensors[name] for name in inside}, tmp_path / file)
    index = {"metadata": {}, "weight_map": {name: file for file, inside in halves.items() for name in inside}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert output_of(tmp_path) == expected


def test_bfloat16_checkpoint_in_float32(tmp_path: Path, qwen3: tuple[Path, list[int]]) -> None:
    folder, _ = qwen3
    rounded = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    widened = {name: tensor.float() for name, tensor in rounded.items()}
    assert output_of(copy_with(folder, tmp_path / "a", rounded)) == output_of(
        copy_with(folder, tmp_path / "b", widened)
    )


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_fused_experts_load_like_separate_ones(tmp_path: Path, family: str) -> None:
    """transformers keeps all experts of a layer in one tensor, and has been seen to save them so."""
    model = random_model(family)
    separate = save(model, tmp_path / "separate")
    fused = dict(model.state_dict())
    assert any(name.endswith("experts.gate_up_proj") for name in fused)
    assert output_of(copy_with(separate, tmp_path / "fused", fused)) == output_of(separate)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_text_model_inside_a_multimodal_gemma3(tmp_path: Path, prefix: str) -> None:
    text = save(random_model("gemma3"), tmp_path / "text")
    tensors = load_file(text / "model.safetensors")
    inside = {name.replace("model.", prefix, 1): tensor for name, tensor in tensors.items()}
    inside["vision_tower.embeddings.weight"] = torch.zeros(2, 2)
    whole = tmp_path / "whole"
    copy_with(text, whole, inside)
    config = json.loads((text / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": config}))
    assert output_of(whole) == output_of(text)


def test_mxfp4_expands_as_in_transformers() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 8, 2, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(110, 135, (3, 8, 2), generator=generator, dtype=torch.uint8)
    expected = convert_moe_packed_tensors(blocks.clone(), scales.clone(), dtype=torch.bfloat16)
    assert torch.equal(expand_mxfp4(blocks, scales, torch.bfloat16), expected.transpose(1, 2))


def test_mxfp4_checkpoint(tmp_path: Path) -> None:
    """Experts stored as MXFP4 give what the same numbers give when stored plainly."""
    plain = save(random_model("gpt_oss"), tmp_path / "plain")
    tensors = load_file(plain / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    packed = dict(tensors)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inner, rows = tensors[name].shape
        blocks = torch.randint(0, 256, (experts, rows, inner // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.full((experts, rows, inner // 32), 125, dtype=torch.uint8)
        packed[f"{name}_blocks"], packed[f"{name}_scales"] = blocks, scales
        del packed[name]
        tensors[name] = expand_mxfp4(blocks, scales, torch.float32).transpose(1, 2)
    config = json.loads((plain / "config.json").read_text())
    copy_with(plain, tmp_path / "packed", packed)
    (tmp_path / "packed" / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}})
    )
    assert output_of(tmp_path / "packed") == output_of(copy_with(plain, tmp_path / "expanded", tensors))


def test_dummy_weights_depend_on_the_seed_only(qwen3: tuple[Path, list[int]]) -> None:
    def first(seed: int) -> torch.Tensor:
        products = products_for(qwen3[0])
        fill_random(products, seed)
        return torch.cat([parameter.flatten() for parameter in products.model.parameters()])

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))
    assert first(1).isfinite().all()


# ---- what is refused


def change(folder: Path, target: Path, edit: Any) -> Path:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    return copy_with(folder, target, tensors)


def test_missing_tensor_is_named(tmp_path: Path, qwen3: tuple[Path, list[int]]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    folder = change(qwen3[0], tmp_path / "m", lambda tensors: tensors.pop(name))
    with pytest.raises(UsageError, match=f"lacks {name}"):
        load_weights(products_for(folder), folder)


def test_unexpected_tensor_is_named(tmp_path: Path, qwen3: tuple[Path, list[int]]) -> None:
    folder = change(qwen3[0], tmp_path / "m", lambda t: t.update({"model.layers.0.adapter": torch.zeros(1)}))
    with pytest.raises(UsageError, match=r"model\.layers\.0\.adapter"):
        load_weights(products_for(folder), folder)


def test_tensor_of_another_shape_is_named(tmp_path: Path, qwen3: tuple[Path, list[int]]) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    folder = change(qwen3[0], tmp_path / "m", lambda tensors: tensors.update({name: torch.zeros(4, 64)}))
    with pytest.raises(UsageError, match=rf"{name} has shape \[4, 64\]; config\.json asks for \[32, 64\]"):
        load_weights(products_for(folder), folder)


def test_tensor_of_integers_is_named(tmp_path: Path, qwen3: tuple[Path, list[int]]) -> None:
    name = "model.norm.weight"
    folder = change(qwen3[0], tmp_path / "m", lambda tensors: tensors.update({name: torch.zeros(64).int()}))
    with pytest.raises(UsageError, match=f"{name} is stored as"):
        load_weights(products_for(folder), folder)


def test_pickled_weights_are_refused(tmp_path: Path, qwen3: tuple[Path, list[int]]) -> None:
    (tmp_path / "config.json").write_bytes((qwen3[0] / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04 a pickle")
    with pytest.raises(EnvironmentFault, match="pickled weights") as caught:
        load_weights(products_for(tmp_path), tmp_path)
    assert "safetensors" in caught.value.hint


def header(entries: dict[str, Any]) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def hostile_files() -> dict[str, bytes]:
    tensor = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    return {
        "header_of_2^63_bytes": struct.pack("<Q", 1 << 63) + b"{}",
        "header_longer_than_the_file": struct.pack("<Q", 1 << 20) + b"{}",
        "overlapping_tensors": header({"a": tensor, "b": tensor}) + bytes(16),
        "truncated_data": header({"a": tensor}) + bytes(7),
        "offsets_backwards": header({"a": {**tensor, "data_offsets": [16, 0]}}) + bytes(16),
        "shape_overflows": header({"a": {**tensor, "shape": [1 << 62, 1 << 62]}}) + bytes(16),
        "not_json": struct.pack("<Q", 4) + b"oops",
        "deep_json": struct.pack("<Q", 200_000) + b"[" * 200_000,
        "empty": b"",
    }


@pytest.mark.parametrize("kind", hostile_files())
def test_hostile_safetensors_are_refused_at_once(tmp_path: Path, kind: str, qwen3: tuple[Path, list[int]]) -> None:
    (tmp_path / "model.safetensors").write_bytes(hostile_files()[kind])
    products = products_for(qwen3[0])
    started = time.perf_counter()
    with pytest.raises(PowerbandError) as caught:
        load_weights(products, tmp_path)
    assert caught.value.code == "bad_weights"
    assert time.perf_counter() - started < 20


def test_index_may_not_leave_its_folder(tmp_path: Path, qwen3: tuple[Path, list[int]]) -> None:
    index = {"weight_map": {"model.norm.weight": "../../etc/model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match="outside its folder"):
        load_weights(products_for(qwen3[0]), tmp_path)


def test_incomplete_download_names_the_file(tmp_path: Path, qwen3: tuple[Path, list[int]]) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00003.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(EnvironmentFault, match="model-00002-of-00003"):
        load_weights(products_for(qwen3[0]), tmp_path)


# ---- names


def test_a_name_that_is_no_folder_says_so() -> None:
    with pytest.raises(EnvironmentFault, match="There is no folder"):
        resolve_model(EngineSettings(model="./nowhere"))


def test_without_network_the_hub_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(EnvironmentFault, match="Hugging Face hub") as caught:
        resolve_model(EngineSettings(model="nobody/nothing"))
    assert caught.value.param == "model"


def test_without_network_a_model_that_was_fetched_before_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "models--some--model"
    snapshot = model / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs/main").write_text("0" * 40)
    (snapshot / "config.json").write_text("{}")
    assert resolve_model(EngineSettings(model="some/model")) == snapshot
    with pytest.raises(EnvironmentFault, match="the hub cannot be reached, and it was not fetched before"):
        resolve_model(EngineSettings(model="another/model"))


def fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, float], index: list[str], *, listed: bool = True
) -> list[str]:
    """What the hub is asked for of a repository with these files, filtered as its library filters."""
    from huggingface_hub.utils import filter_repo_objects

    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    def model_info(_api: Any, name: str, revision: str | None) -> Any:
        if not listed:
            raise OSError("no network")
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in files])

    def hf_hub_download(name: str, file: str, revision: str | None) -> str:
        (tmp_path / file).write_text(json.dumps({"weight_map": dict(zip(map(str, range(99)), index, strict=False))}))
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    assert resolve_model(EngineSettings(model="owner/name", revision="v2")) == tmp_path
    assert (asked["name"], asked["revision"]) == ("owner/name", "v2")
    allow, ignore = asked["allow_patterns"], asked["ignore_patterns"]
    return list(filter_repo_objects(list(files), allow_patterns=allow, ignore_patterns=ignore))


def shards(count: int, first: int = 1) -> list[str]:
    return [f"model-{i:05}-of-{count:05}.safetensors" for i in range(first, first + count)]


INDEX = "model.safetensors.index.json"
# Published lists of files, with sizes in GB: (files, what its index names, GB that are loaded)
REPOSITORIES: dict[str, tuple[dict[str, float], list[str], float]] = {
    "openai/gpt-oss-20b": (
        {**dict.fromkeys(shards(3, 0), 4.6), INDEX: 0, "original/model.safetensors": 13.8, "metal/model.bin": 13.8},
        shards(3, 0),
        13.8,
    ),
    "mistralai/Mistral-7B-Instruct-v0.3": (
        {"consolidated.safetensors": 14.5, **dict.fromkeys(shards(3), 4.8), INDEX: 0, "tokenizer.model.v3": 0},
        shards(3),
        14.4,
    ),
    "meta-llama/Llama-3.2-1B": ({"model.safetensors": 2.5, "original/consolidated.00.pth": 2.5}, [], 2.5),
    "with an adapter": ({"model.safetensors": 2.5, "adapter_model.safetensors": 0.1}, [], 2.5),
    "with pickles and other frameworks": (
        {"model.safetensors": 2.5, "pytorch_model.bin": 2.5, "onnx/model.onnx": 2.5, "tf_model.h5": 2.5},
        [],
        2.5,
    ),
}


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("name", REPOSITORIES)
def test_weights_are_fetched_once(name: str, listed: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files, index, expected = REPOSITORIES[name]
    kept = {"config.json": 0, "tokenizer.json": 0, "chat_template.jinja": 0, "additional_chat_templates/tool.jinja": 0}
    files = {**files, **kept, "original/params.json": 0, "modeling.py": 0}
    found = fetched(monkeypatch, tmp_path, files, index, listed=listed)
    assert sum(files[file] for file in found) == pytest.approx(expected)
    assert set(kept) <= set(found)
    assert not any(file.endswith((".py", ".bin", ".pth", "params.json")) for file in found)


def test_whole_file_and_shards_are_not_both_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = {"model.safetensors": 5.0, **dict.fromkeys(shards(2), 2.5), INDEX: 0, "model.fp16.safetensors": 2.5}
    found = fetched(monkeypatch, tmp_path, files, shards(2))
    assert [file for file in found if files[file]] == ["model.safetensors"]


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.safetensors", "model.gguf"])
def test_nothing_is_fetched_of_a_repository_that_cannot_be_loaded(
    file: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(EnvironmentFault, match="'owner/name' on the Hugging Face hub holds"):
        fetched(monkeypatch, tmp_path, {file: 1.0, "config.json": 0}, [])


# ---- other providers of the matrix product


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
def test_packed_product_equals_the_plain_one(dtype: torch.dtype, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    linear = Linear(1024, 1088, bias=bias, dtype=dtype, device=torch.device("cpu"))
    for parameter in linear.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    inputs = [torch.randn(rows, 1024, generator=generator).to(dtype) for rows in (1, 7, 40)]
    with torch.inference_mode():
        expected = [linear(x) for x in inputs]
        product = OneDnnProvider().prepare(linear.weight, linear.bias)
        assert product is not None
        linear.install([product], "onednn")
        assert linear.weight.numel() == 0  # one copy only
        for x, plain in zip(inputs, expected, strict=True):
            torch.testing.assert_close(linear(x), plain, rtol=2e-2 if dtype is torch.bfloat16 else 1e-4, atol=1e-2)


def test_a_weight_that_others_read_stays_as_it_is() -> None:
    linear = Linear(64, 64, bias=False, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert OneDnnProvider(keep=linear.weight).prepare(linear.weight, None) is None


def test_an_embedding_reads_the_packed_weight_of_its_head() -> None:
    embedding = Embedding(37, 50, scale=2.0, dtype=torch.bfloat16, device=torch.device("cpu"))
    embedding.weight.copy_(torch.randn(37, 50, generator=torch.Generator().manual_seed(0)))
    ids = torch.tensor([0, 36, 15, 16, 16, 1])
    expected = embedding(ids)
    embedding.share(pack(embedding.weight))
    assert embedding.weight.numel() == 0
    assert torch.equal(embedding(ids), expected)
    assert embedding(ids[:0]).shape == (0, 50)
