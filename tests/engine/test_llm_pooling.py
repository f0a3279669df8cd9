"""`LLM.embed` and `LLM.score`, with names as in vLLM, beside SentenceTransformer and CrossEncoder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentence_models as models
import torch
from sentence_models import normalize

from powerband import LLM, PoolingParams
from powerband.errors import InvalidRequest, RequestTooLong

SETTINGS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "threads": 1}
QUERY = "open a file"
DOCUMENTS = ["a file is not a list", "hello world", "to open the file", "a tuple of tokens is not mutable. " * 6]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bert")
    return models.sentence_model(
        models.random_encoder(root / "base"), root / "model", "mean", normalize, prompts={"query": "list of "}
    )


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), **SETTINGS, max_num_seqs=3) as made:
        yield made


def test_embed_gives_the_vectors_of_sentence_transformers(llm: LLM, folder: Path) -> None:
    results = llm.embed([*DOCUMENTS[:3], {"prompt": QUERY}], use_tqdm=False)
    expected = models.expected(folder, [*DOCUMENTS[:3], QUERY])
    np.testing.assert_allclose([result.outputs.embedding for result in results], expected, atol=2e-5)
    assert all(result.finished and result.prompt_token_ids for result in results)
    [cut] = llm.embed(QUERY, pooling_params=PoolingParams(dimensions=8), use_tqdm=False)
    expected = models.expected(folder, [QUERY], truncate_dim=8, normalize_embeddings=True)
    np.testing.assert_allclose([cut.outputs.embedding], expected, atol=2e-5)


def test_a_prompt_and_the_cut_are_those_of_sentence_transformers(llm: LLM, folder: Path) -> None:
    long = ["hello " * 200]
    found = llm.embed(long, use_tqdm=False, truncate_prompt_tokens=-1, prompt_name="query")
    expected = models.expected(folder, long, prompt_name="query")
    np.testing.assert_allclose([found[0].outputs.embedding], expected, atol=2e-5)
    assert len(found[0].prompt_token_ids) == 96


def test_score_of_embeddings_is_their_cosine(llm: LLM, folder: Path) -> None:
    found = [result.outputs.score for result in llm.score(QUERY, DOCUMENTS[:3], use_tqdm=False)]
    vectors = torch.tensor(models.expected(folder, [QUERY, *DOCUMENTS[:3]]))
    np.testing.assert_allclose(found, torch.cosine_similarity(vectors[:1], vectors[1:]), atol=2e-5)
    each = llm.score(DOCUMENTS[:2], DOCUMENTS[1:3], use_tqdm=False)
    assert each[0].outputs.score == pytest.approx(
        float(torch.cosine_similarity(vectors[1], vectors[2], dim=0)), abs=2e-5
    )


@pytest.mark.parametrize("family", ["bert", "roberta", "qwen3"])
def test_score_of_a_cross_encoder_is_that_of_sentence_transformers(tmp_path: Path, family: str) -> None:
    from sentence_transformers import CrossEncoder

    folder = (
        models.random_classifier(tmp_path)
        if family == "qwen3"
        else models.random_encoder(tmp_path, family, head="ForSequenceClassification", num_labels=1)
    )
    with LLM(str(folder), **SETTINGS, max_model_len=96) as llm:
        found = [
            result.outputs.score for result in llm.score(QUERY, DOCUMENTS, use_tqdm=False, truncate_prompt_tokens=-1)
        ]
        with pytest.raises(InvalidRequest, match="no embeddings"):
            llm.embed("x")
    theirs = CrossEncoder(str(folder), device="cpu", max_length=96)
    expected = theirs.predict([(QUERY, document) for document in DOCUMENTS], show_progress_bar=False)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert max(found) - min(found) > 1e-3


def test_what_is_wrong_is_named(llm: LLM) -> None:
    with pytest.raises(RequestTooLong, match=r"Prompt 1: It has \d+ tokens; the model takes 96"):
        llm.embed(["x", "hello " * 200])
    with pytest.raises(InvalidRequest, match="'dimensions' is 65"):
        llm.embed("x", pooling_params=PoolingParams(dimensions=65))
    with pytest.raises(InvalidRequest, match="'prompt_name' is 'poem'"):
        llm.embed("x", prompt_name="poem")
    with pytest.raises(InvalidRequest, match="data_1 has 2 texts and data_2 3"):
        llm.score(["a", "b"], ["a", "b", "c"])
    with pytest.raises(InvalidRequest, match="does not generate"):
        llm.generate("x")


def test_a_classifier_of_several_labels_gives_no_score(tmp_path: Path) -> None:
    folder = models.random_encoder(tmp_path, head="ForSequenceClassification", num_labels=3)
    with LLM(str(folder), **SETTINGS) as llm, pytest.raises(InvalidRequest, match="3 labels"):
        llm.score("a", "b")
