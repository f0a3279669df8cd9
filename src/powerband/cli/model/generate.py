"""`powerband generate`: one prompt to one text, streamed to stdout, without a server."""

from __future__ import annotations

import json as json_format
import sys
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from powerband.cli.flags import Json, takes_settings
from powerband.cli.model.serve import require_engine
from powerband.core.params import SamplingParams
from powerband.core.request import EngineRequest
from powerband.errors import EnvironmentFault, RequestTooLong, UsageError
from powerband.metrics.record import RequestRecord
from powerband.spec.settings import EngineSettings
from powerband.spec.settings_layers import Resolved

if TYPE_CHECKING:
    from powerband.engine.client.messages import EngineInfo
    from powerband.engine.client.output import OutputDelta
    from powerband.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 256
# A single request has no queue to be ordered in, and nobody to share with.
FOR_MANY_REQUESTS = (
    *("served_model_name", "max_num_seqs", "scheduling_policy", "enable_prefix_caching"),
    *("max_num_queued_reqs", "max_num_queued_tokens", "long_prefill_token_threshold"),
)


@dataclass(slots=True)
class Output:
    """What has been generated so far."""

    prompt_tokens: int
    sent_s: float
    text: str = ""
    finish_reason: str = ""
    times_s: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def add(self, delta: OutputDelta, time_s: float) -> None:
        self.text += delta.text
        if delta.token_ids:
            self.times_s.append(time_s)
            self.counts.append(len(delta.token_ids))
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason.value

    def report(self) -> dict[str, Any]:
        record = RequestRecord(
            scheduled_s=self.sent_s,
            sent_s=self.sent_s,
            chunk_times_s=tuple(self.times_s),
            chunk_tokens=tuple(self.counts),
            output_tokens=sum(self.counts),
        )
        return {
            "text": self.text,
            "finish_reason": self.finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": record.output_tokens,
            "ttft_s": record.ttft_s,
            "tpot_s": record.tpot_s,
        }


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
    output = asyncio.run(_generate(replace(settings.engine, max_num_seqs=1), text, raw, given, show=not json))
    print(json_format.dumps(output.report(), indent=2) if json else "")
    return 0


async def _generate(settings: EngineSettings, text: str, raw: bool, given: dict[str, Any], show: bool) -> Output:
    """Run the request in an engine of its own. With `show`, the text goes to stdout piece by piece."""
    from powerband.engine.client.messages import RemoteError
    from powerband.engine.client.output import OutputProcessor
    from powerband.engine.client.supervisor import EngineProcess
    from powerband.metrics.logging import set_up_logging
    from powerband.text.tokenizer import Tokenizer

    set_up_logging("warning")
    engine = EngineProcess(settings)
    try:
        info = await engine.start()
        tokenizer = Tokenizer.load(settings.tokenizer or info.model_folder)
        if tokenizer is None:
            raise EnvironmentFault(
                f"{settings.model} has no tokenizer.", hint="Name one with --tokenizer.", param="tokenizer"
            )
        token_ids = _token_ids(tokenizer, text, raw, settings.chat_template)
        params = _complete(given, len(token_ids), info.with_end(tokenizer.eos_token_id))
        request = EngineRequest(id="generate", token_ids=token_ids, params=params, arrival_s=time.monotonic())
        output = Output(len(token_ids), request.arrival_s)
        processor = OutputProcessor(tokenizer, params, token_ids)
        stream = engine.submit([request])
        while steps := await stream.take():
            for step in steps:
                if step.error is not None:
                    raise RemoteError(step.error)
                delta = processor.process(step)
                output.add(delta, step.time_s)
                if show:
                    print(delta.text, end="", flush=True)
        return output
    finally:
        await engine.stop()


def _token_ids(tokenizer: Tokenizer, text: str, raw: bool, template_file: str | None) -> list[int]:
    """The prompt as the model reads it: as a user's message where it has a chat template, else as it is."""
    from powerband.text.chat_template import ChatTemplate

    template = None if raw else ChatTemplate.load(tokenizer, template_file)
    if template is None:
        return tokenizer.encode(text)
    try:
        chat = template.render([{"role": "user", "content": text}])
    finally:
        template.close()
    return tokenizer.encode(chat, add_special_tokens=False)


def _complete(given: dict[str, Any], prompt_tokens: int, info: EngineInfo) -> SamplingParams:
    """With what only the model knows. Raises RequestTooLong when prompt and output exceed its context."""
    fields = {"temperature": 0.0, **info.sampling_defaults}
    room = info.max_model_len - prompt_tokens
    max_tokens = given.get("max_tokens") or min(int(fields.pop("max_tokens", DEFAULT_MAX_TOKENS)), room)
    if max_tokens < 1 or max_tokens > room:
        raise RequestTooLong(
            f"The context holds {info.max_model_len} tokens: the prompt has {prompt_tokens}, which leaves room for "
            f"{max(room, 0)}.",
            limit=info.max_model_len,
            hint="Shorten the prompt, or lower --max-tokens.",
        )
    return SamplingParams(**{**fields, **given, "max_tokens": max_tokens, "eos_token_ids": info.eos_token_ids})
