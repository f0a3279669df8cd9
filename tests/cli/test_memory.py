"""`powerband memory`: the plan from config.json alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from powerband.cli.main import main

QWEN3_0_6B = {
    **{"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "torch_dtype": "bfloat16", "hidden_act": "silu"},
    **{"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "vocab_size": 151936},
    **{"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960},
    **{"rms_norm_eps": 1e-6, "rope_theta": 1000000, "tie_word_embeddings": True, "attention_bias": False},
    **{"eos_token_id": 151645, "bos_token_id": 151643},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_0_6B))
    return tmp_path


def test_plan_in_numbers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--dtype", "bfloat16", "--device", "cpu", "--kv-cache-memory", "1GiB", "--max-model-len", "4096"]
    assert main(["memory", str(folder), *arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["parameters"] == 596_049_920  # as the model's page says: 0.6B
    assert plan["weights_bytes"] == 2 * 596_049_920
    assert plan["kv_tokens"] == 2**30 // (2 * 28 * 8 * 128 * 2) // 32 * 32
    assert plan["total_bytes"] <= plan["available_bytes"]


def test_plan_for_people_from_the_file_itself(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", str(folder / "config.json"), "--device", "cpu", "--max-num-seqs", "8"]) == 0
    shown = capsys.readouterr().out
    assert "qwen3, 596,049,920 parameters" in shown
    assert "weights" in shown
    assert "KV cache" in shown


def test_what_cannot_fit_ends_with_3_and_advice(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", str(folder), "--device", "cpu", "--kv-cache-memory", "900TiB"]) == 3
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "does not fit" in printed.err
    assert "--kv-cache-memory" in printed.err


def test_model_that_is_not_there_ends_with_3(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", "./no-such-folder"]) == 3
    assert "no-such-folder" in capsys.readouterr().err


def test_unknown_kind_of_model_ends_with_2(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "config.json").write_text(json.dumps(QWEN3_0_6B | {"model_type": "qwen33"}))
    assert main(["memory", str(folder)]) == 2
    assert "qwen3" in capsys.readouterr().err
