"""One prompt, answered by an engine that is started for it and ends with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from powerband.core.params import SamplingParams
from powerband.core.request import EngineRequest
from powerband.engine.client.messages import EngineInfo, RemoteError
from powerband.engine.client.output import OutputDelta, OutputProcessor
from powerband.engine.client.supervisor import EngineProcess
from powerband.errors import EnvironmentFault, RequestTooLong
from powerband.metrics.record import RequestRecord
from powerband.spec.settings import EngineSettings
from powerband.text.chat_template import ChatTemplate
from powerband.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 256


@dataclass(slots=True)
class GeneratedText:
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


async def generate_text(
    settings: EngineSettings,
    prompt: str,
    params: Mapping[str, Any],
    *,
    raw: bool = False,
    on_text: Callable[[str], object],
) -> GeneratedText:
    """Start an engine, run the prompt as its only request, and stop it. on_text gets each piece of text at once.

    params: fields of SamplingParams; others are as the model's own files say. raw: no chat template.
    Raises EnvironmentFault, RequestTooLong, and RemoteError for what failed in the engine.
    """
    engine = EngineProcess(replace(settings, max_num_seqs=1))
    try:
        info = await engine.start()
        tokenizer = Tokenizer.load(settings.tokenizer or info.model_folder)
        if tokenizer is None:
            raise EnvironmentFault(
                f"{settings.model} has no tokenizer.", hint="Name one with --tokenizer.", param="tokenizer"
            )
        token_ids = _token_ids(tokenizer, prompt, raw, settings.chat_template)
        chosen = _complete(params, len(token_ids), info.with_end(tokenizer.eos_token_id))
        request = EngineRequest(id="generate", token_ids=token_ids, params=chosen, arrival_s=time.monotonic())
        output = GeneratedText(len(token_ids), request.arrival_s)
        processor = OutputProcessor(tokenizer, chosen, token_ids)
        stream = engine.submit([request])
        while steps := await stream.take():
            for step in steps:
                if step.error is not None:
                    raise RemoteError(step.error)
                delta = processor.process(step)
                output.add(delta, step.time_s)
                on_text(delta.text)
        return output
    finally:
        await engine.stop()


def _token_ids(tokenizer: Tokenizer, text: str, raw: bool, template_file: str | None) -> list[int]:
    """The prompt as the model reads it: as a user's message where it has a chat template, else as it is."""
    template = None if raw else ChatTemplate.load(tokenizer, template_file)
    if template is None:
        return tokenizer.encode(text)
    try:
        chat = template.render([{"role": "user", "content": text}])
    finally:
        template.close()
    return tokenizer.encode(chat, add_special_tokens=False)


def _complete(given: Mapping[str, Any], prompt_tokens: int, info: EngineInfo) -> SamplingParams:
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
