"""`powerband eval`: exercises with a right answer and held-out text, through the engine, one row per precision.

The exercises are those that the demo model learnt, in the words that it learnt: for that model the accuracy says what
a precision or a cache costs. Other models may know the answer and word it differently, which counts as wrong.
"""

from __future__ import annotations

import json as json_format
import platform
from dataclasses import asdict, replace
from typing import Annotated, Literal, get_args

from cyclopts import Parameter

from powerband.cli.flags import Json, takes_settings
from powerband.cli.model.serve import require_engine
from powerband.cli.progress import progress_bar
from powerband.cli.tables import print_table
from powerband.errors import UsageError
from powerband.evaluation import ModelEvaluation, evaluate_model
from powerband.spec.settings import EngineSettings
from powerband.spec.settings_layers import Resolved
from powerband.text.eval_tasks import KINDS

Dtype = Literal["auto", "float32", "float16", "bfloat16"]
OWN_OR_WITHOUT_MEANING = ("dtype", "seed", "generation_config", "served_model_name", "load_format", "scheduling_policy")


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
    require_engine(settings)
    if samples < 1:
        raise UsageError(f"--samples is {samples}; it must be at least 1.", param="samples")
    rows: list[ModelEvaluation] = []
    pending = _dtypes(dtype) if dtype else [settings.engine.dtype]
    with progress_bar() as report_progress:
        while pending:
            engine = replace(settings.engine, dtype=pending.pop(0))
            row, stored = evaluate_model(engine, samples, seed, report_progress)
            rows.append(row)
            if dtype is None and len(rows) == 1 and stored != row.dtype:
                pending += _dtypes(stored)
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


def _table(rows: list[ModelEvaluation]) -> list[list[str]]:
    table = [["dtype", *KINDS, "perplexity", "bits/byte", "seconds"]]
    for row in rows:
        shares = [f"{row.accuracy[kind]:.0%}" for kind in KINDS]
        table.append([row.dtype, *shares, f"{row.perplexity:.2f}", f"{row.bits_per_byte:.3f}", f"{row.seconds:.0f}"])
    return table
