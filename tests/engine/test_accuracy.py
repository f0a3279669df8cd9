"""What a precision costs: the demo model's perplexity on text that it never saw, against bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from powerband import evaluation
from powerband.engine.kernels.cpu import library
from powerband.engine.offline.llm import LLM

INT8_LOSS, INT4_LOSS = 0.01, 0.08  # shares of bfloat16's perplexity


def perplexity(**settings: Any) -> float:
    with LLM("demo", dtype="bfloat16", weight_cache="off", max_num_seqs=32, max_model_len=1024, **settings) as llm:
        return evaluation.text_loss(llm)[0]


@pytest.fixture(scope="module", autouse=True)
def shorter_text() -> Iterator[None]:
    """Twelve pieces of 32: about 6,000 tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "PIECES", 12)
        yield


@pytest.fixture(scope="module")
def reference(shorter_text: None) -> float:
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
