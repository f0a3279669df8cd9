"""`powerband eval`: exercises with a right answer and held-out text, through the engine, one row per precision.

The exercises are those that the demo model learnt, in the words that it learnt: for that model the accuracy says what
a precision or a cache costs. Other models may know the answer and word it differently, which counts as wrong.
"""

from __future__ import annotations

import json as json_format
import math
import platform
import time
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from cyclopts import Parameter

from powerband.cli.flags import Json, takes_settings
from powerband.cli.model.serve import require_model
from powerband.cli.settings import Resolved
from powerband.cli.tables import print_table
from powerband.core.params import SamplingParams
from powerband.errors import EnvironmentFault, UsageError
from powerband.spec.model.reader import read_model_spec
from powerband.spec.settings import EngineSettings
from powerband.text.corpus import held_out_documents
from powerband.text.eval_tasks import KINDS, eval_tasks

if TYPE_CHECKING:
    from powerband.engine.llm import LLM

Dtype = Literal["auto", "float32", "float16", "bfloat16"]
OWN_OR_WITHOUT_MEANING = ("dtype", "seed", "generation_config", "served_model_name", "load_format", "scheduling_policy")
ANSWER_TOKENS = 128  # more than the longest answer takes
PIECE_CHARS = 1500  # of held-out text, measured without what stands before it
PIECES = 32


@dataclass(frozen=True, slots=True)
class EvalRow:
    """What was measured at one precision. Accuracy is a share (0..1) per kind of exercise."""

    dtype: str
    accuracy: dict[str, float]
    perplexity: float  # per token: compares precisions of one model
    bits_per_byte: float  # of text: compares models with different tokenizers too
    text_tokens: int
    seconds: float


@takes_settings(EngineSettings, without=OWN_OR_WITHOUT_MEANING)
def evaluate(
    settings: Resolved,
    *,
    dtype: Annotated[
        str | None, Parameter(help="Precisions, e.g. float32,bfloat16; default: auto, and that of the checkpoint")
    ] = None,
    samples: Annotated[int, Parameter(help="Exercises of each kind")] = 200,
    seed: Annotated[int, Parameter(help="Which exercises; the same seed asks the same ones")] = 0,
    json: Json = False,
) -> int:
    """Print the accuracy of MODEL per exercise and its perplexity on held-out text, one row per precision.

    The text is the documentation of the Python that runs this: another version carries slightly different text.
    """
    require_model(settings)
    if samples < 1:
        raise UsageError(f"--samples is {samples}; it must be at least 1.", param="samples")
    rows: list[EvalRow] = []
    wanted = _dtypes(dtype) if dtype else [settings.engine.dtype]
    while wanted:
        row, stored = _measure(replace(settings.engine, dtype=wanted.pop(0)), samples, seed)
        rows.append(row)
        if dtype is None and len(rows) == 1 and stored != row.dtype:
            wanted.append(stored)
    if json:
        report = {"model": settings.engine.model, "samples": samples, "seed": seed}
        report["python"] = platform.python_version()
        print(json_format.dumps({**report, "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        print_table(_table(rows))
    return 0


def _dtypes(text: str) -> list[Dtype]:
    known = {name: name for name in get_args(Dtype)}
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise UsageError(f"--dtype has {name!r}; known are {', '.join(known)}.", param="dtype")
    return list(dict.fromkeys(known[name] for name in names))


def _measure(settings: EngineSettings, samples: int, seed: int) -> tuple[EvalRow, Dtype]:
    """A row, and the precision of the checkpoint."""
    from rich.console import Console
    from rich.progress import Progress

    from powerband.engine.llm import LLM

    start_s = time.monotonic()
    with LLM(**asdict(settings)) as llm, Progress(console=Console(stderr=True), transient=True) as progress:
        if llm.get_tokenizer() is None:
            raise EnvironmentFault(
                f"{settings.model} has no tokenizer, so it cannot be asked anything.",
                hint="Name one with --tokenizer.",
                param="tokenizer",
            )
        steps = progress.add_task(f"{settings.model}, {llm.info.dtype}", total=len(KINDS) + 1)
        accuracy = {}
        for kind in KINDS:
            accuracy[kind] = exercise_accuracy(llm, kind, samples, seed)
            progress.advance(steps)
        perplexity, bits_per_byte, tokens = text_loss(llm)
        seconds = time.monotonic() - start_s
        [stored] = _dtypes(read_model_spec(Path(llm.info.model_folder)).dtype)
        return EvalRow(llm.info.dtype, accuracy, perplexity, bits_per_byte, tokens, seconds), stored


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


def _table(rows: list[EvalRow]) -> list[list[str]]:
    table = [["dtype", *KINDS, "perplexity", "bits/byte", "seconds"]]
    for row in rows:
        shares = [f"{row.accuracy[kind]:.0%}" for kind in KINDS]
        table.append([row.dtype, *shares, f"{row.perplexity:.2f}", f"{row.bits_per_byte:.3f}", f"{row.seconds:.0f}"])
    return table
