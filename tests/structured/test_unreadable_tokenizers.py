"""A tokenizer that llguidance cannot read: requests with a form are refused by name, all others are served."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer as JsonTokenizer
from tokenizers import decoders, models, pre_tokenizers

from powerband import LLM, SamplingParams, StructuredOutputsParams
from powerband.core.structured_outputs import StructuredOutputsParams as Outputs
from powerband.errors import InvalidRequest
from powerband.structured import compiler
from powerband.structured.compiler import GrammarCompiler
from powerband.text.tokenizer import Tokenizer
from server.servers_for_tests import RunningServer, running_server

CODE = "structured_outputs_not_available"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary of SentencePiece without bytes for the characters that it lacks, as T5 and XLM-RoBERTa have it."""
    pieces = [("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz")]
    made = JsonTokenizer(models.Unigram(pieces, unk_id=0))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RunningServer]:
    with running_server(f"tokenizer={folder}") as running:
        yield running


@pytest.mark.parametrize(
    "form",
    [
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"regex": "a+"}},
        {"structured_outputs": {"choice": ["a"]}},
    ],
)
def test_a_form_is_refused_and_the_reason_named(server: RunningServer, form: dict[str, object]) -> None:
    answer = server.post("/v1/completions", prompt="a b", max_tokens=3, **form)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, CODE), error
    assert "Metaspace" in error["message"]
    assert "response_format, structured_outputs and tools" in error["message"]


def test_everything_else_is_served(server: RunningServer) -> None:
    assert server.post("/v1/completions", prompt="a b", max_tokens=3).json()["choices"][0]["text"]
    assert server.post("/tokenize", prompt="a b").status_code == 200


def test_the_tokenizer_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    started = []
    start = compiler.WorkerProcess
    monkeypatch.setattr(compiler, "WorkerProcess", lambda *given: started.append(given) or start(*given))
    made = GrammarCompiler(tokenizer, 28, [0])
    for _ in range(3):
        with pytest.raises(InvalidRequest, match="Metaspace") as refused:
            made.grammar(Outputs(regex="a"))
        assert refused.value.code == CODE
    assert len(started) == 1


def test_an_engine_of_ones_own_refuses_it_likewise(folder: Path) -> None:
    with LLM("demo", tokenizer=str(folder), load_format="dummy", device="cpu", kv_cache_memory="16MiB") as llm:
        asked = SamplingParams(max_tokens=2, structured_outputs=StructuredOutputsParams(regex="a"))
        with pytest.raises(InvalidRequest, match=r"Prompt 0: .*llguidance cannot read"):
            llm.generate("a b", asked, use_tqdm=False)
        assert llm.generate("a b", SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)[0].finished
