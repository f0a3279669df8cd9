"""An engine whose model is a rule, in a process of its own like the real one: it repeats its prompt for ever."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import powerband
from powerband.core.admission import SchedulerLimits
from powerband.core.clock import Clock
from powerband.core.kv_cache import KVCacheManager
from powerband.core.loop import EngineCore, Inbox
from powerband.core.scheduler import Scheduler
from powerband.core.simulation import SimExecutor
from powerband.core.step import NewRequest, Step, StepResult, TokenLogprobs
from powerband.engine.client.messages import AdapterInfo, EngineInfo
from powerband.engine.process import main
from powerband.errors import EnvironmentFault, InvalidRequest, UsageError
from powerband.spec.settings import EngineSettings

STEP_S, LONG_STEP_S = 0.003, 0.1  # with the second one a stream lasts until it is cut
CONTEXT, ECHO_CONTEXT = 512, 2048
VOCABULARY = 4096
IM_START, IM_END, USER = 1, 2, [1883, 201]  # of the demo model's tokenizer: <|im_start|>, <|im_end|>, "user\n"
DEMO = Path(powerband.__file__).parent / "demo"


class ParrotExecutor(SimExecutor):
    """Samples the prompt's tokens in order, again and again. A token's alternatives are the ids after it."""

    def __init__(self, clock: Clock, step_s: float = STEP_S) -> None:
        super().__init__(clock, lambda step: step_s)
        self.known: dict[str, NewRequest] = {}

    def script(self, prompt: list[int]) -> list[int]:
        """What it says, again and again."""
        return prompt

    def run(self, step: Step) -> StepResult:
        for id in step.dropped:
            self.known.pop(id, None)
        result = StepResult({})
        for work in step.works:
            if work.new:
                self.known[work.id] = work.new
            request = self.known[work.id]
            prompt = request.token_ids[: request.num_prompt_tokens]
            script = self.script(prompt)
            end = work.start + work.num_tokens
            if request.params.prompt_logprobs is not None:
                rows = prompt[work.start + 1 : end + 1]
                result.prompt_logprobs[work.id] = [logprobs(id, request.params.prompt_logprobs) for id in rows]
            if work.samples:
                token = script[(end - len(prompt)) % len(script)]
                result.tokens[work.id] = [token]
                if request.params.logprobs is not None:
                    result.logprobs[work.id] = [logprobs(token, request.params.logprobs)]
        return result


class EchoExecutor(ParrotExecutor):
    """Samples the tokens of the last user message, from "<|im_start|>user\\n" to "<|im_end|>", and ends with that."""

    def script(self, prompt: list[int]) -> list[int]:
        start, head, end = 0, [IM_START, *USER], IM_END
        for place in range(len(prompt)):
            if prompt[place : place + len(head)] == head:
                start = place + len(head)
        return prompt[start : prompt.index(end, start) + 1]


def logprobs(token: int, num_alternatives: int) -> TokenLogprobs:
    ids = [token, *((token + i) % VOCABULARY for i in range(num_alternatives))]
    return TokenLogprobs(ids, [-0.5, *(-0.5 - i for i in range(num_alternatives))], rank=1)


class FakeAdapters:
    """Takes every folder for an adapter, but for "bad" and "missing"; of "until:FILE" it waits for the file."""

    def __init__(self) -> None:
        self.names: dict[str, AdapterInfo] = {}

    def begin_load(self, name: str, source: str, replace: bool = False) -> Callable[[], AdapterInfo]:
        if source == "bad":
            raise UsageError("lora_A has shape [4, 64]; the model asks for [4, 32].", code="bad_adapter", param="lora")
        if source == "missing":
            raise EnvironmentFault("There is no folder 'missing'.", code="adapter_not_found", param="lora")
        while source.startswith("until:") and not Path(source.removeprefix("until:")).exists():
            time.sleep(0.01)
        if name in self.names and not replace:
            raise InvalidRequest(f"An adapter {name!r} is loaded already.", code="adapter_exists", param="lora_name")
        info = AdapterInfo(name, source, digest=f"digest of {source}", rank=4, memory_bytes=1024)
        return lambda: self.names.setdefault(name, info)

    def remove(self, name: str) -> AdapterInfo:
        return self.names.pop(name)

    def release(self) -> None:
        """Nothing is held."""


@dataclass
class Built:
    core: EngineCore
    info: EngineInfo
    adapters: FakeAdapters = field(default_factory=FakeAdapters)
    residuals: None = None  # no latency model knows it

    def close(self) -> None:
        """Nothing is open."""


def build(settings: EngineSettings, *, inbox: Inbox, clock: Clock, progress: Callable[[str, float], None]) -> Built:
    progress("weights", 1.0)
    if settings.model == "broken":
        raise EnvironmentFault("No folder 'broken'.", hint="Give a folder.", code="model_not_found")
    if settings.model == "crashing":
        sys.exit(7)
    if settings.model == "slow":
        time.sleep(60)
    kv = KVCacheManager(num_blocks=256, block_size=16)
    context = ECHO_CONTEXT if settings.model == "echo" else CONTEXT
    limits = SchedulerLimits(
        max_model_len=context, max_num_seqs=settings.max_num_seqs, max_num_queued_reqs=settings.max_num_queued_reqs
    )
    step_s = {"hanging": 60.0, "long-steps": LONG_STEP_S}.get(settings.model, STEP_S)
    executor = (EchoExecutor if settings.model == "echo" else ParrotExecutor)(clock, step_s)
    core = EngineCore(Scheduler(kv, limits), executor, clock, inbox)
    info = EngineInfo(
        model_folder=str(DEMO),
        max_model_len=context,
        vocab_size=VOCABULARY,
        eos_token_ids=[2, 0],  # as the demo model has
        kv_capacity_tokens=256 * 16,
        device="cpu",
        dtype="float32",
        summary="A parrot",
        config={"model": settings.model},
    )
    return Built(core, info)


if __name__ == "__main__":
    sys.exit(main(build))
