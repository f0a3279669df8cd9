"""When decodes are captured in graphs: on a GPU with kernels that do the same in every step, unless asked not to."""

import pytest
import torch

pytest.importorskip("msgspec", reason="a machine that only checks kernels may lack it")

from powerband.engine.attention import BackendSelection
from powerband.engine.build import graph_rows
from powerband.spec.settings import EngineSettings


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
    settings = EngineSettings(max_num_seqs=40, enforce_eager=enforce_eager)
    assert graph_rows(settings, torch.device(device), BackendSelection(attention, "for this test")) == largest_batch
