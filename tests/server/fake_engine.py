"""An engine whose model is a rule, in a process of its own like the real one: it writes its prompt backwards."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from powerband.core.admission import SchedulerLimits
from powerband.core.clock import Clock
from powerband.core.kv_cache import KVCacheManager
from powerband.core.loop import EngineCore, Inbox
from powerband.core.scheduler import Scheduler
from powerband.core.simulation import SimExecutor
from powerband.core.step import Step, StepResult
from powerband.engine.messages import EngineInfo
from powerband.engine.process import main
from powerband.errors import EnvironmentFault
from powerband.spec.settings import EngineSettings

STEP_S = 0.005


class BackwardsExecutor(SimExecutor):
    """Answers with the prompt's tokens from the last to the first, again and again."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock, lambda step: STEP_S)
        self.prompts: dict[str, list[int]] = {}

    def run(self, step: Step) -> StepResult:
        for id in step.dropped:
            self.prompts.pop(id, None)
        tokens = {}
        for work in step.works:
            if work.new:
                self.prompts[work.id] = work.new.token_ids[: work.new.num_prompt_tokens]
            if work.samples:
                prompt = self.prompts[work.id]
                tokens[work.id] = [prompt[-1 - (work.start + work.num_tokens - len(prompt)) % len(prompt)]]
        return StepResult(tokens)


@dataclass
class Built:
    core: EngineCore
    info: EngineInfo


def build(settings: EngineSettings, *, inbox: Inbox, clock: Clock, progress: Callable[[str, float], None]) -> Built:
    progress("weights", 1.0)
    if settings.model == "broken":
        raise EnvironmentFault("No folder 'broken'.", hint="Give a folder.", code="model_not_found")
    if settings.model == "crashing":
        sys.exit(7)
    kv = KVCacheManager(num_blocks=64, block_size=16)
    limits = SchedulerLimits(
        max_model_len=512, max_num_seqs=settings.max_num_seqs, max_num_queued_reqs=settings.max_num_queued_reqs
    )
    core = EngineCore(Scheduler(kv, limits), BackwardsExecutor(clock), clock, inbox)
    info = EngineInfo(
        model_folder=settings.model,
        max_model_len=512,
        vocab_size=1000,
        eos_token_ids=[],
        kv_capacity_tokens=1024,
        device="cpu",
        dtype="float32",
        summary="a fake",
        config={},
    )
    return Built(core, info)


if __name__ == "__main__":
    start_s = time.monotonic()
    sys.exit(main(build))
