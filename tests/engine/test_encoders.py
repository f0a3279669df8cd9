"""Encoders: the vectors of sentence-transformers, whole texts in one step, and no KV cache in the memory plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentence_models as models
import torch
from engines_for_tests import TestEngine
from sentence_models import HIDDEN, normalize
from test_pooling import CLOSE, embed, vectors

from powerband.cost.memory import plan_memory
from powerband.errors import UsageError
from powerband.spec.model.counts import count_parameters
from powerband.spec.model.reader import read_model_spec
from powerband.spec.settings import EngineSettings

SETTINGS: dict[str, Any] = {"max_model_len": None, "kv_cache_memory": None, "max_num_batched_tokens": 128}
TEXTS = ["hello, world", "a list is mutable, a tuple is not. " * 3, "x", "open a file", "a b c d e f g h i j k l m n"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.random_encoder(tmp_path_factory.mktemp("bert"))


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize(("pooling", "modules"), [("mean", (normalize,)), ("cls", ())])
def test_vectors_are_those_of_sentence_transformers(
    tmp_path: Path, family: str, pooling: str, modules: tuple[Any, ...]
) -> None:
    base = models.random_encoder(tmp_path / "base", family)
    folder = models.sentence_model(base, tmp_path / "model", pooling, *modules)
    expected = models.expected(folder, TEXTS)
    for settings in ({}, {"async_scheduling": True}, {"max_num_seqs": 2}):
        with TestEngine(folder, **{**SETTINGS, **settings}) as engine:
            np.testing.assert_allclose(vectors(embed(engine, folder, TEXTS)), expected, atol=CLOSE)


def test_a_text_is_never_cut_into_chunks(bert: Path) -> None:
    """Each of these fills most of a step, so that the next one must wait for the step after."""
    with TestEngine(bert, **SETTINGS, long_prefill_token_threshold=16) as engine:
        texts = ["a list of tokens " * 20] * 4
        tokens: list[int] = []
        core = engine.engine.core
        core.observer = lambda record: tokens.extend(work.num_tokens for work in record.step.works)
        assert len(vectors(embed(engine, bert, texts))) == 4
        assert len(tokens) == 4
        assert min(tokens) > 64


def test_without_modules_texts_are_averaged(bert: Path) -> None:
    """As sentence-transformers does where nothing else is said."""
    with TestEngine(bert, **SETTINGS) as engine:
        np.testing.assert_allclose(vectors(embed(engine, bert, TEXTS)), models.expected(bert, TEXTS), atol=CLOSE)


def test_the_first_names_of_norms_are_read(bert: Path, tmp_path: Path) -> None:
    folder = models.rewritten(
        bert,
        tmp_path / "old",
        lambda name: "bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("Norm.bias", "Norm.beta"),
    )
    with TestEngine(folder, **SETTINGS) as engine:
        np.testing.assert_allclose(vectors(embed(engine, folder, TEXTS)), models.expected(bert, TEXTS), atol=CLOSE)


def test_parameters_are_those_of_transformers(bert: Path) -> None:
    import transformers

    theirs = transformers.AutoModel.from_pretrained(bert, add_pooling_layer=False)
    assert count_parameters(read_model_spec(bert)).total == sum(p.numel() for p in theirs.parameters())


def test_the_memory_plan_has_no_cache_and_counts_the_weights(bert: Path) -> None:
    spec = read_model_spec(bert)
    with TestEngine(bert, **SETTINGS) as engine:
        plan = engine.engine.memory
        assert plan.parts["kv_cache"] == plan.parts["sampling"] == 0
        assert plan.parts["weights"] == engine.engine.report.weights_bytes
        assert (plan.max_model_len, spec.max_position) == (96, 96)  # what the tokenizer says, of 128 positions


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"kv_cache_memory": "1GiB"}, "kv_cache_memory"),
        ({"max_model_len": 90, "max_num_batched_tokens": 64, "max_num_seqs": 8}, "max_num_batched_tokens"),
        ({"max_model_len": 200}, "max_model_len"),
    ],
)
def test_settings_that_an_encoder_cannot_have_are_named(bert: Path, settings: dict[str, Any], param: str) -> None:
    with pytest.raises(UsageError) as caught:
        plan_memory(read_model_spec(bert), EngineSettings(**settings), 1 << 34, kind="cpu")
    assert caught.value.param == param


def test_an_encoder_runs_in_bfloat16_and_with_quantized_weights(bert: Path) -> None:
    expected = models.expected(bert, TEXTS)
    for settings, least in (({"dtype": "bfloat16"}, 0.999), ({"dtype": "auto", "quantization": "int8"}, 0.99)):
        with TestEngine(bert, **{**SETTINGS, **settings}) as engine:
            found = vectors(embed(engine, bert, TEXTS))
        cosine = torch.cosine_similarity(torch.tensor(found), torch.tensor(expected))
        assert cosine.min() > least


def test_random_weights_serve_for_trying_it_out(bert: Path) -> None:
    with TestEngine(bert, **SETTINGS, load_format="dummy") as engine:
        found = vectors(embed(engine, bert, TEXTS))
    assert found.shape == (len(TEXTS), HIDDEN)
    assert np.isfinite(found).all()
