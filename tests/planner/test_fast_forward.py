"""Steps that are done at once are exactly those that are done one by one: times, tokens, blocks, cache, preemptions."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import NO_HOST, PlainModel, deployment, drawn, played

from powerband.core.loop import EngineCore
from powerband.errors import PowerbandError
from powerband.planner.simulation import fast_forward, replica, simulator
from powerband.planner.simulation.replica import SimulatedReplica
from powerband.spec.workload.arrivals import ClosedLoop, OpenLoop
from powerband.spec.workload.lengths import Fixed, Uniform
from powerband.spec.workload.workload import Conversation, SharedPrefix


def story(seed: int, *, fast: bool) -> Any:
    """Everything that a small random world comes to. Equal seeds are equal worlds."""
    rng = random.Random(seed)
    talk = Conversation(Uniform(1, 4), think_s=rng.choice([0.0, 0.3])) if rng.random() < 0.5 else None
    prefix = SharedPrefix(Fixed(rng.randrange(1, 60)), groups=2) if rng.random() < 0.5 else None
    users = rng.random() < 0.3
    schedule = drawn(
        rng.randrange(1, 40),
        arrivals=ClosedLoop(rng.randrange(1, 9), rng.choice([0.0, 0.1])) if users else OpenLoop.at(rng.choice([3, 30])),
        prompt=Uniform(1, rng.choice([30, 200])),
        output=Uniform(1, rng.choice([5, 80])),
        conversation=talk,
        prefix=prefix,
        seed=seed,
    )
    where = deployment(
        rng.choice([1, 1, 3]),
        max_num_seqs=rng.choice([2, 5, 32]),
        max_num_batched_tokens=rng.choice([32, 100, 2048]),
        long_prefill_token_threshold=rng.choice([0, 20]),
        max_model_len=rng.choice([150, 4096]),
        enable_prefix_caching=rng.random() < 0.7,
    )
    host = dataclasses.replace(
        NO_HOST,
        step_s=0.001,
        per_request_s=1e-4,
        arrival_s=0.004,
        answer_s=0.01,
        answer_request_s=1e-3,
        overlapped=rng.random() < 0.5,
    )
    made: list[SimulatedReplica] = []

    def recording(*args: Any, **options: Any) -> SimulatedReplica:
        made.append(SimulatedReplica(*args, **options))
        return made[-1]

    with mock.patch.object(simulator, "SimulatedReplica", recording):
        model = PlainModel(0.01, 1e-5, rng.choice([0.0, 1e-6]), host)
        found = played(
            schedule,
            where,
            model,
            num_blocks=rng.choice([14, 20, 40, 400]),
            fast_forward=fast,
            slowdown=1.1,
            slo_ttft_s=rng.choice([None, 0.3]),
        )
    pools = [made_one.scheduler.kv.pool for made_one in made]
    for one in made:
        one.scheduler.kv.check(one.scheduler.running)
    cached = [[(pool.key_of[b], pool.parent_of[b]) for b in pool.cached] for pool in pools]
    return found, cached, [one.scheduler.counters for one in made]


@settings(max_examples=150)
@given(st.integers(0, 2**32))
def test_fast_forward_changes_nothing(seed: int) -> None:
    assert story(seed, fast=True) == story(seed, fast=False)


def test_most_steps_of_an_easy_load_are_fast_forwarded() -> None:
    with mock.patch.object(EngineCore, "step", autospec=True, side_effect=EngineCore.step) as step:
        simulation = played(drawn(20, rate=1, output=Fixed(200)))
    assert simulation.total("num_steps") > 1000
    assert step.call_count < 200


FAULTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "who waits is not looked at": (fast_forward, "_may_start", lambda scheduler: False),
    "blocks are not counted": (fast_forward, "_within_memory", lambda scheduler, most: most),
    "commands come too late": (replica, "bisect_left", lambda starts, due: len(starts)),
    "tokens are another's": (replica.ModelExecutor, "tokens_of", lambda self, r, start, end: range(start, end)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault: str) -> None:
    def differs(seed: int) -> bool:
        right = story(seed, fast=False)
        with mock.patch.object(*FAULTS[fault]):
            try:
                return bool(story(seed, fast=True) != right)
            except (TypeError, PowerbandError):  # a block that is not there
                return True

    assert any(differs(seed) for seed in range(60))
