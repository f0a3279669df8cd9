"""/v1/embeddings with a real engine: vectors as sentence-transformers makes them, in the shape that OpenAI gives."""

from __future__ import annotations

import base64
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from servers_for_tests import RunningServer, running_server

sys.path.append(str(Path(__file__).parents[1] / "engine"))

import sentence_models as models
from sentence_models import TEXTS, normalize

PROMPTS = {"query": "find: ", "document": "text: "}
SETTINGS = ("--max-model-len", "256", "--kv-cache-memory", "4MiB", "--dtype", "float32", "--threads", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sentences")
    base = models.random_decoder(root / "base")
    return models.sentence_model(base, root / "model", "lasttoken", normalize, prompts=PROMPTS)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RunningServer]:
    command = ("-m", "powerband", "serve", str(folder), "--served-model-name", "tiny", "--port")
    with running_server(*SETTINGS, command=command, timeout_s=90) as running:
        yield running


def test_the_official_client_gets_the_vectors_of_sentence_transformers(server: RunningServer, folder: Path) -> None:
    expected = models.expected(folder, TEXTS)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        as_base64 = client.embeddings.create(model="tiny", input=TEXTS)  # the client's default
        as_numbers = client.embeddings.create(model="tiny", input=TEXTS, encoding_format="float")
        one = client.embeddings.create(model="tiny", input=TEXTS[0], dimensions=8)
    for reply in (as_base64, as_numbers):
        assert [item.index for item in reply.data] == [0, 1, 2, 3]
        np.testing.assert_allclose([item.embedding for item in reply.data], expected, atol=2e-5)
    assert (one.object, one.model, one.data[0].object) == ("list", "tiny", "embedding")
    cut = models.expected(folder, TEXTS[:1], truncate_dim=8, normalize_embeddings=True)
    np.testing.assert_allclose([one.data[0].embedding], cut, atol=2e-5)


def test_base64_is_little_endian_float32(server: RunningServer) -> None:
    numbers = embedding(server, input="x", encoding_format="float")
    text = embedding(server, input="x", encoding_format="base64")
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(text), "<f4"), np.array(numbers, np.float32))


def test_tokens_are_taken_and_counted(server: RunningServer) -> None:
    ids = server.post("/tokenize", prompt=TEXTS[0]).json()["tokens"]
    assert embedding(server, input=ids) == pytest.approx(embedding(server, input=TEXTS[0]), abs=2e-6)
    reply = server.post("/v1/embeddings", input=[ids, ids[:3]]).json()
    assert reply["usage"] == {"prompt_tokens": len(ids) + 3, "total_tokens": len(ids) + 3}


@pytest.mark.parametrize(
    ("chosen", "name"),
    [
        ({"prompt_name": "query"}, "query"),
        ({"input_type": "query"}, "query"),
        ({"input_type": "search_query"}, "query"),
        ({"input_type": "document"}, "document"),
        ({"input_type": "search_document"}, "document"),
        ({"input_type": "passage"}, "document"),
    ],
)
def test_a_prompt_of_the_checkpoint_goes_before_the_text(
    server: RunningServer, chosen: dict[str, str], name: str
) -> None:
    with_prompt = embedding(server, input="a text", **chosen)
    assert with_prompt == pytest.approx(embedding(server, input=PROMPTS[name] + "a text"), abs=2e-6)


def test_a_long_text_is_refused_unless_it_may_be_cut(server: RunningServer) -> None:
    ids = [7] * 300
    refused = server.post("/v1/embeddings", input=["x", "word " * 300])
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert "'input.1'" in refused.json()["error"]["message"]
    assert "takes 256" in refused.json()["error"]["message"]
    cut = embedding(server, input=ids, truncate_prompt_tokens=-1)
    assert cut == pytest.approx(embedding(server, input=ids[:256]), abs=2e-6)
    assert embedding(server, input=ids, truncate_prompt_tokens=5) == pytest.approx(
        embedding(server, input=[7] * 5), abs=2e-6
    )


def test_many_inputs_come_back_in_order(server: RunningServer) -> None:
    """More than run at once, and more tokens than the engine is given at once."""
    texts = [f"text number {i} " * (i % 7 + 1) for i in range(600)]
    reply = server.post("/v1/embeddings", input=texts).json()
    assert [item["index"] for item in reply["data"]] == list(range(600))
    for i in (0, 299, 599):
        assert reply["data"][i]["embedding"] == pytest.approx(embedding(server, input=texts[i]), abs=2e-5)


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"input": []}, "input", "empty list"),
        ({"input": ""}, "input", "no tokens"),
        ({"input": [[1], []]}, "input.1", "no tokens"),
        ({"input": ["a", [1]]}, "input", "mixes"),
        ({"input": [5000]}, "input", "0 to 4095"),
        ({"input": ["a"] * 2049}, "input", "the limit is 2048"),
        ({"input": "a", "dimensions": 65}, "dimensions", "have 64"),
        ({"input": "a", "dimensions": 0}, "dimensions", ""),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", ""),
        ({"input": "a", "input_type": "poem"}, "input_type", "document, query"),
        ({"input": "a", "prompt_name": "passage"}, "prompt_name", "document, query"),
        ({"input": "a", "prompt_name": "query", "input_type": "query"}, "input_type", "both"),
        ({"input": "a", "priority": 1}, "priority", "no effect"),
        ({"input": "a", "stream": True}, "stream", ""),
        ({"model": "tiny"}, "input", ""),
    ],
)
def test_what_is_wrong_is_named(server: RunningServer, body: dict[str, Any], param: str, said: str) -> None:
    reply = server.post("/v1/embeddings", **body)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param
    assert said in reply.json()["error"]["message"]


def test_text_is_not_generated_by_an_embedding_model(server: RunningServer) -> None:
    chat = {"messages": [{"role": "user", "content": "hello"}]}
    for path, body in (("/v1/completions", {"prompt": "x"}), ("/v1/chat/completions", chat)):
        reply = server.post(path, **body)
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "model_does_not_generate")
        assert "/v1/embeddings" in reply.json()["error"]["message"]


def test_everything_is_given_back_and_counted(server: RunningServer) -> None:
    before = server.figure("powerband_prompt_tokens_total")
    server.post("/v1/embeddings", input=[[1, 2, 3], [4, 5]])
    assert server.figure("powerband_prompt_tokens_total") == before + 5
    server.until(lambda: server.figure("powerband_kv_cache_usage_ratio") == 0)


def embedding(server: RunningServer, **body: Any) -> Any:
    """The vector of one input."""
    reply = server.post("/v1/embeddings", **body)
    assert reply.status_code == 200, reply.text
    return reply.json()["data"][0]["embedding"]


def test_documents_are_ranked_by_the_cosine_of_embeddings_with_the_prompts_of_a_search(
    server: RunningServer, folder: Path
) -> None:
    query, documents = "how to open a file", ["a list", "open(path) opens a file", "nothing"]
    [asked] = models.expected(folder, [PROMPTS["query"] + query])
    found = models.expected(folder, [PROMPTS["document"] + text for text in documents]) @ asked
    reply = server.post("/v1/rerank", query=query, documents=documents).json()
    assert [item["index"] for item in reply["results"]] == list(np.argsort(-found))
    assert [item["relevance_score"] for item in reply["results"]] == pytest.approx(sorted(found)[::-1], abs=2e-5)
    plain = models.expected(folder, [query, *documents])
    scores = server.post("/v1/score", text_1=query, text_2=documents).json()
    assert [item["score"] for item in scores["data"]] == pytest.approx(list(plain[1:] @ plain[0]), abs=2e-5)
