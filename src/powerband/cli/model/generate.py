"""`powerband generate`: one prompt to one text, streamed to stdout, without a server."""

from __future__ import annotations

import functools
import json as json_format
import sys
from collections.abc import Callable
from typing import Annotated, Any

from cyclopts import Parameter

from powerband.cli.flags import Json, takes_settings
from powerband.cli.model.serve import require_engine
from powerband.core.params import SamplingParams
from powerband.errors import UsageError
from powerband.spec.settings import EngineSettings
from powerband.spec.settings_layers import Resolved

# A single request has no queue to be ordered in, and nobody to share with.
FOR_MANY_REQUESTS = (
    *("served_model_name", "max_num_seqs", "scheduling_policy", "enable_prefix_caching"),
    *("max_num_queued_reqs", "max_num_queued_tokens", "long_prefill_token_threshold"),
)


@takes_settings(EngineSettings, without=FOR_MANY_REQUESTS)
def generate(
    settings: Resolved,
    *,
    prompt: Annotated[
        str,
        Parameter(help="What the model answers or goes on from; '-' reads it from stdin", allow_leading_hyphen=True),
    ],
    raw: Annotated[
        bool, Parameter(help="Go on from the prompt as it is, without the model's chat template", negative="")
    ] = False,
    max_tokens: Annotated[
        int | None, Parameter(help="Most output tokens; default: the model's own, else 256, or what the context leaves")
    ] = None,
    temperature: Annotated[
        float | None, Parameter(help="0: always the most likely token; default: the model's own, else 0")
    ] = None,
    top_p: Annotated[
        float | None,
        Parameter(help="Only the most likely tokens that together reach this probability; default: the model's own"),
    ] = None,
    json: Json = False,
) -> int:
    """Write the model's answer to a prompt on stdout, as it is generated."""
    import asyncio

    require_engine(settings)
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise UsageError("The prompt is empty.", param="prompt")
    asked: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}
    given = {name: value for name, value in asked.items() if value is not None}
    SamplingParams(**given)  # wrong values are refused before the model is loaded
    from powerband.engine.client.single_prompt import generate_text
    from powerband.metrics.logging import set_up_logging

    set_up_logging("warning")
    show: Callable[[str], object] = (lambda _: None) if json else functools.partial(print, end="", flush=True)
    output = asyncio.run(generate_text(settings.engine, text, given, raw=raw, on_text=show))
    print(json_format.dumps(output.report(), indent=2) if json else "")
    return 0
