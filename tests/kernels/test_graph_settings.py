"""When decodes are captured in graphs: on a GPU with kernels that do the same in every step, unless asked not to."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("msgspec", reason="a machine that only checks kernels may lack it")

from powerband.engine.attention import Choice
from powerband.engine.build import _executor_config
from powerband.spec.reader import read_model_spec
from powerband.spec.settings import EngineSettings

SPEC = read_model_spec(
    {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
    }
)


@pytest.mark.parametrize(
    ("device", "attention", "enforce_eager", "largest_batch"),
    [
        ("cuda", "triton", False, 40),
        ("cuda", "triton", True, 0),
        ("cuda", "reference", False, 0),
        ("cpu", "reference", False, 0),
    ],
)
def test_batches_that_graphs_are_captured_for(device, attention, enforce_eager, largest_batch):
    settings = EngineSettings(max_num_seqs=40, enforce_eager=enforce_eager, dtype="float32", max_model_len=64)
    config = _executor_config(settings, SPEC, Path("."), torch.device(device), Choice(attention, "for this test"))
    assert config.graph_rows == largest_batch
