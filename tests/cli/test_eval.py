"""`powerband eval`: one row per precision, perplexity as transformers computes it, and clear refusals."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import powerband
from powerband import evaluation
from powerband.cli.main import main

DEMO = Path(powerband.__file__).parent / "demo"


@pytest.fixture(autouse=True)
def few_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "PIECES", 2)


def test_a_row_per_precision_with_the_perplexity_that_transformers_finds(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", "demo", "--dtype", "float32,bfloat16", "--samples", "2", "--threads", "1", "--json"]

    assert main(arguments) == 0

    report = json.loads(capsys.readouterr().out)
    exact, rounded = report["rows"]
    assert (exact["dtype"], rounded["dtype"]) == ("float32", "bfloat16")
    assert set(exact["accuracy"]) == {"add", "subtract", "multiply", "copy", "lookup", "json"}
    assert exact["perplexity"] == pytest.approx(perplexity_by_transformers(), rel=1e-4)
    assert rounded["perplexity"] == pytest.approx(exact["perplexity"], rel=0.05)


def perplexity_by_transformers() -> float:
    tokenizer, model = AutoTokenizer.from_pretrained(DEMO), AutoModelForCausalLM.from_pretrained(DEMO, dtype="float32")
    nats, tokens = 0.0, 0
    for piece in evaluation._pieces():
        ids = tokenizer(piece, return_tensors="pt").input_ids
        with torch.no_grad():
            nats += model(input_ids=ids, labels=ids).loss.item() * (ids.numel() - 1)
        tokens += ids.numel() - 1
    return math.exp(nats / tokens)


@pytest.mark.parametrize(
    ("missing", "code", "sentence"),
    [
        (["tokenizer.json", "tokenizer_config.json"], 3, "has no tokenizer"),
        (["tokenizer_config.json"], 2, "no chat template"),
    ],
)
def test_a_model_that_cannot_be_asked_is_refused(
    missing: list[str], code: int, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(DEMO, tmp_path / "model", ignore=shutil.ignore_patterns(*missing))

    assert main(["eval", str(tmp_path / "model"), "--samples", "1", "--threads", "1"]) == code

    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--dtype", "float32,int3"], ["--samples", "0"]])
def test_impossible_options_are_named(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "demo", *option]) == 2
    assert option[0] in capsys.readouterr().err
