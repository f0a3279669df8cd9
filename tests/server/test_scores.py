"""/v1/score and /v1/rerank with a real cross-encoder, beside sentence-transformers; shapes as at vLLM and Cohere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from servers_for_tests import RunningServer, running_server

sys.path.append(str(Path(__file__).parents[1] / "engine"))

import sentence_models as models

QUERY = "open a file"
DOCUMENTS = ["a file is not a list", "hello world", "to open the file", "a tuple is mutable"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.random_encoder(tmp_path_factory.mktemp("scorer"), head="ForSequenceClassification", num_labels=1)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RunningServer]:
    command = ("-m", "powerband", "serve", str(folder), "--served-model-name", "tiny", "--threads", "1", "--port")
    with running_server(command=command, timeout_s=90) as running:
        yield running


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[float]:
    """Scores of the query with each document."""
    from sentence_transformers import CrossEncoder

    pairs = [(QUERY, document) for document in DOCUMENTS]
    found: list[float] = CrossEncoder(str(folder), device="cpu").predict(pairs, show_progress_bar=False).tolist()
    return found


def test_scores_are_those_of_sentence_transformers(server: RunningServer, expected: list[float]) -> None:
    for path in ("/v1/score", "/score"):
        reply = server.post(path, model="tiny", text_1=QUERY, text_2=DOCUMENTS).json()
        assert [item["score"] for item in reply["data"]] == pytest.approx(expected, abs=2e-5)
    assert (reply["object"], reply["data"][1]["object"], reply["data"][1]["index"]) == ("list", "score", 1)
    assert reply["usage"]["total_tokens"] == reply["usage"]["prompt_tokens"] > 0
    each = server.post("/v1/score", data_1=[QUERY] * 4, data_2=DOCUMENTS).json()
    assert [item["score"] for item in each["data"]] == pytest.approx(expected, abs=2e-5)


def test_documents_are_ranked_by_their_scores(server: RunningServer, expected: list[float]) -> None:
    order = sorted(range(4), key=lambda index: -expected[index])
    for path in ("/v1/rerank", "/v2/rerank", "/rerank"):
        reply = server.post(path, model="tiny", query=QUERY, documents=DOCUMENTS).json()
        assert [item["index"] for item in reply["results"]] == order
    assert [item["relevance_score"] for item in reply["results"]] == pytest.approx(
        [expected[index] for index in order], abs=2e-5
    )
    assert reply["results"][0]["document"] == {"text": DOCUMENTS[order[0]]}
    best = server.post("/v1/rerank", query=QUERY, documents=[{"text": text} for text in DOCUMENTS], top_n=2).json()
    assert [item["index"] for item in best["results"]] == order[:2]
    short = server.post("/v1/rerank", query=QUERY, documents=DOCUMENTS, return_documents=False).json()
    assert "document" not in short["results"][0]


def test_raw_scores_are_those_before_the_activation(server: RunningServer, expected: list[float]) -> None:
    import math

    raw = server.post("/v1/score", text_1=QUERY, text_2=DOCUMENTS, use_activation=False).json()
    assert [1 / (1 + math.exp(-item["score"])) for item in raw["data"]] == pytest.approx(expected, abs=2e-5)


def test_long_pairs_are_refused_unless_they_may_be_cut(server: RunningServer, folder: Path) -> None:
    from sentence_transformers import CrossEncoder

    pair = ("hello " * 70, "world " * 80)
    refused = server.post("/v1/score", text_1=pair[0], text_2=pair[1])
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert "takes 96" in refused.json()["error"]["message"]
    cut = server.post("/v1/score", text_1=pair[0], text_2=pair[1], truncate_prompt_tokens=-1).json()
    theirs = CrossEncoder(str(folder), device="cpu").predict([pair], show_progress_bar=False)
    assert cut["data"][0]["score"] == pytest.approx(float(theirs[0]), abs=2e-5)
    assert cut["usage"]["prompt_tokens"] == 96


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1"),
        ("/v1/score", {"text_1": "a"}, "text_2"),
        ("/v1/score", {"text_1": "a", "data_1": "a", "text_2": "b"}, "data_1"),
        ("/v1/score", {"text_1": "a", "text_2": []}, "text_2"),
        ("/v1/rerank", {"query": "a", "documents": []}, "documents"),
        ("/v1/rerank", {"query": "a", "documents": ["a"] * 2049}, "documents"),
        ("/v1/rerank", {"documents": ["a"]}, "query"),
        ("/v1/rerank", {"query": "a", "documents": ["a"], "top_n": -1}, "top_n"),
        ("/v1/rerank", {"query": "a", "documents": ["a"], "rank_fields": ["x"]}, "rank_fields"),
    ],
)
def test_what_is_wrong_is_named(server: RunningServer, path: str, body: dict[str, Any], param: str) -> None:
    reply = server.post(path, **body)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param


def test_a_model_of_scores_gives_no_embeddings_and_no_text(server: RunningServer) -> None:
    for path, body in (("/v1/embeddings", {"input": "x"}), ("/v1/completions", {"prompt": "x"})):
        reply = server.post(path, **body)
        assert reply.status_code == 400
        assert "/v1/score" in reply.json()["error"]["message"]
