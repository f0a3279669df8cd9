"""How well a model answers in one precision: exercises with a known answer, and perplexity on held-out text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from powerband.core.params import SamplingParams
from powerband.errors import EnvironmentFault
from powerband.spec.model.reader import read_model_spec
from powerband.spec.settings import EngineSettings
from powerband.text.corpus import held_out_documents
from powerband.text.eval_tasks import KINDS, eval_tasks

if TYPE_CHECKING:
    from powerband.engine.offline.llm import LLM

ANSWER_TOKENS = 128  # more than the longest answer takes
PIECE_CHARS = 1500  # of held-out text, each measured without the text before it
PIECES = 32


@dataclass(frozen=True, slots=True)
class ModelEvaluation:
    dtype: str
    accuracy: dict[str, float]  # 0 to 1, by kind of exercise
    perplexity: float  # per token: compares precisions of one model
    bits_per_byte: float  # of text: compares models with different tokenizers too
    text_tokens: int
    seconds: float


def evaluate_model(
    settings: EngineSettings, samples: int, seed: int, report: Callable[[str, float], None]
) -> tuple[ModelEvaluation, str]:
    """A model in one precision, and the precision of its checkpoint. Raises EnvironmentFault without a tokenizer."""
    from powerband.engine.offline.llm import LLM

    start_s = time.monotonic()
    with LLM(**asdict(settings)) as llm:
        if llm.get_tokenizer() is None:
            raise EnvironmentFault(
                f"{settings.model} has no tokenizer, so it cannot be asked anything.",
                hint="Name one with --tokenizer.",
                param="tokenizer",
            )
        name, accuracy = f"{settings.model}, {llm.info.dtype}", {}
        for number, kind in enumerate(KINDS):
            report(name, number / (len(KINDS) + 1))
            accuracy[kind] = exercise_accuracy(llm, kind, samples, seed)
        report(name, len(KINDS) / (len(KINDS) + 1))
        perplexity, bits_per_byte, tokens = text_loss(llm)
        seconds = time.monotonic() - start_s
        stored = read_model_spec(Path(llm.info.model_folder)).dtype
        return ModelEvaluation(llm.info.dtype, accuracy, perplexity, bits_per_byte, tokens, seconds), stored


def exercise_accuracy(llm: LLM, kind: str, samples: int, seed: int) -> float:
    """Share of `samples` held-out exercises of one kind that the model answers right, greedily, in a chat."""
    asked = list(islice(eval_tasks(kind, seed, held_out=True), samples))
    conversations: list[list[dict[str, Any]]] = [[{"role": "user", "content": e.question}] for e in asked]
    params = SamplingParams(temperature=0.0, max_tokens=ANSWER_TOKENS)
    replies = llm.chat(conversations, params, use_tqdm=False)
    right = sum(e.is_right(reply.outputs[0].text) for e, reply in zip(asked, replies, strict=True))
    return right / samples


def text_loss(llm: LLM) -> tuple[float, float, int]:
    """(perplexity per token, bits per byte, tokens measured) on pieces spread evenly over the held-out text."""
    pieces = _pieces()
    outputs = llm.generate(pieces, SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    nats, tokens = 0.0, 0
    for output in outputs:
        for token, alternatives in zip(output.prompt_token_ids, output.prompt_logprobs or (), strict=True):
            if alternatives is not None:
                nats -= alternatives[token].logprob
                tokens += 1
    text_bytes = sum(len(piece.encode()) for piece in pieces)
    return math.exp(nats / tokens), nats / math.log(2) / text_bytes, tokens


def _pieces() -> list[str]:
    text = "\n\n".join(document.text for document in held_out_documents())
    every = [text[start : start + PIECE_CHARS] for start in range(0, len(text) - PIECE_CHARS, PIECE_CHARS)]
    return every[:: max(1, len(every) // PIECES)][:PIECES]
