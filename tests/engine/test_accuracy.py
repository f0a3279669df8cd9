"""What a precision costs: the demo model's perplexity on text that it never saw, against bfloat16."""

from __future__ import annotations

from typing import Any

import pytest

from powerband.engine.kernels.cpu import library
from powerband.engine.offline.llm import LLM
from powerband.evaluation import text_loss

INT8_LOSS, INT4_LOSS = 0.01, 0.05  # shares of bfloat16's perplexity


def perplexity(**settings: Any) -> float:
    with LLM("demo", dtype="bfloat16", weight_cache="off", max_num_seqs=32, max_model_len=1024, **settings) as llm:
        return text_loss(llm)[0]


@pytest.fixture(scope="module")
def reference() -> float:
    if library.load().tier is None:
        pytest.skip("plain torch takes too long, and test_quantization.py compares it")
    return perplexity()


@pytest.mark.parametrize(
    ("settings", "loss"),
    [
        ({"quantization": "int8"}, INT8_LOSS),
        ({"quantization": "int8", "quantize_head": False}, INT8_LOSS),
        ({"quantization": "int4"}, INT4_LOSS),
    ],
)
def test_perplexity_stays_near_that_of_bfloat16(settings: dict[str, Any], loss: float, reference: float) -> None:
    assert perplexity(**settings) == pytest.approx(reference, rel=loss)
