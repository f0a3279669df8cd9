"""Whether the head is the embedding is what the weights say, not config.json: as transformers loads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engines_for_tests import TestEngine
from models_for_tests import FAMILIES, greedy, healthy_model, save
from safetensors.torch import load_file, save_file

from powerband.cost.memory import plan_memory
from powerband.spec.checkpoint.files import has_own_head
from powerband.spec.model.checkpoint_precision import read_for_planning
from powerband.spec.model.counts import count_parameters
from powerband.spec.model.reader import read_model_spec
from powerband.spec.settings import EngineSettings

PROMPT = [5, 17, 99, 42, 7, 7, 130, 1]


def say_tied(folder: Path, tied: bool = True) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied}))
    return folder


def change(folder: Path, **tensors: torch.Tensor | None) -> Path:
    """Other tensors, by name with _ for . between the parts; None takes one away."""
    path = folder / "model.safetensors"
    stored = {name: tensor.clone() for name, tensor in load_file(path).items()}
    for name, tensor in tensors.items():
        name = {"head": "lm_head.weight", "embedding": "model.embed_tokens.weight"}[name]
        stored.pop(name, None)
        if tensor is not None:
            stored[name] = tensor.clone()
    save_file(stored, path, metadata={"format": "pt"})
    return folder


def output_of(folder: Path, **settings: Any) -> list[int]:
    with TestEngine(folder, **settings) as engine:
        return engine.generate([PROMPT])[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_that_differs_is_kept_whatever_the_configuration_says(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, _ = healthy_model(family, [PROMPT], tie_word_embeddings=False)
    folder = say_tied(save(model, tmp_path))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    assert output_of(folder) == greedy(theirs, [PROMPT], 8)[0][0]


@pytest.mark.parametrize("settings", [{}, {"quantization": "int8"}, {"quantization": "int4"}, {"quantize_head": False}])
@pytest.mark.parametrize("family", ["llama3", "qwen3", "gemma2", "mixtral"])
def test_in_every_precision_such_a_model_says_what_an_untied_one_says(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    if "quantize_head" in settings:
        settings = {**settings, "quantization": "int8"}
    folder = save(healthy_model(family, [PROMPT], tie_word_embeddings=False)[0], tmp_path)
    settings = {"dtype": "bfloat16", **settings}
    expected = output_of(say_tied(folder, False), **settings)
    assert output_of(say_tied(folder, True), **settings) == expected


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_an_equal_head_is_the_embedding(quantization: str, tmp_path: Path) -> None:
    model, oracle = healthy_model("qwen3", [PROMPT])
    folder = save(model, tmp_path)
    settings = {} if quantization == "none" else {"dtype": "bfloat16", "quantization": quantization}
    alone = output_of(folder, **settings)
    change(folder, head=load_file(folder / "model.safetensors")["model.embed_tokens.weight"])
    assert read_model_spec(folder).tie_embeddings
    assert output_of(folder, **settings) == alone
    assert quantization != "none" or alone == oracle.continuations[0][:8]


def test_a_tied_model_may_be_stored_with_its_head_only(tmp_path: Path) -> None:
    model, oracle = healthy_model("qwen3", [PROMPT])
    folder = save(model, tmp_path)
    change(folder, head=load_file(folder / "model.safetensors")["model.embed_tokens.weight"], embedding=None)
    assert output_of(folder) == oracle.continuations[0][:8]


def test_one_value_makes_a_head_of_its_own(tmp_path: Path) -> None:
    folder = save(healthy_model("qwen3", [PROMPT])[0], tmp_path)
    head = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].clone()
    assert not has_own_head(folder)
    head[-1, -1] += 1
    assert has_own_head(change(folder, head=head))
    assert has_own_head(change(folder, head=head.bfloat16()))  # of another type: held as it is stored


def test_memory_and_plans_count_it(tmp_path: Path) -> None:
    folder = say_tied(save(healthy_model("qwen3", [PROMPT], tie_word_embeddings=False)[0], tmp_path))
    config = folder / "config.json"
    for spec in (read_model_spec(folder), read_model_spec(config), read_for_planning(config)[0]):
        assert not spec.tie_embeddings
        assert count_parameters(spec).head == spec.vocab_size * spec.hidden_size
    alone = read_model_spec(json.loads(config.read_text()))
    settings = EngineSettings(model=str(folder), kv_cache_memory="1MiB", max_model_len=64)
    own, tied = (plan_memory(each, settings, 8 << 30, kind="cpu") for each in (read_model_spec(folder), alone))
    assert own.parts["weights"] - tied.parts["weights"] == 160 * 64 * 4
