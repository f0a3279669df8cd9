"""What each policy promises, seen in simulation."""

from __future__ import annotations

import statistics

import pytest

from powerband.core.admission import SchedulerLimits
from powerband.core.clock import VirtualClock
from powerband.core.kv_cache import KVCacheManager
from powerband.core.loop import Add, EngineCore
from powerband.core.params import SamplingParams
from powerband.core.policy import POLICY_NAMES, CachedPrefixFirst, Deadline, SchedulingPolicy, Shortest, make_policy
from powerband.core.request import EngineRequest
from powerband.core.scheduler import Scheduler
from powerband.core.simulation import SimExecutor, TraceInbox, run_to_end
from powerband.core.step import TokenOutput
from powerband.errors import UsageError

STEP_S = 0.01


def ask(id: str, arrival_s: float = 0.0, prompt: int = 8, output: int = 4, **more: object) -> EngineRequest:
    tokens = [int.from_bytes(id.encode()[-4:], "big")] * prompt
    params = SamplingParams(max_tokens=output)
    return EngineRequest(id=id, token_ids=tokens, params=params, arrival_s=arrival_s, **more)  # type: ignore[arg-type]


def serve(
    policy: str | SchedulingPolicy, requests: list[EngineRequest], seats: int = 1, num_blocks: int = 256
) -> dict[str, list[TokenOutput]]:
    """Return the outputs of each request, ids in the order of their first token. A step takes 10 ms."""
    clock = VirtualClock()
    executor = SimExecutor(clock, lambda step: STEP_S)
    kv = KVCacheManager(num_blocks, 4)
    limits = SchedulerLimits(max_model_len=1024, max_num_seqs=seats, max_num_batched_tokens=32)
    scheduler = Scheduler(kv, limits, policy=make_policy(policy, kv) if isinstance(policy, str) else policy)
    inbox = TraceInbox(clock, [(request.arrival_s, Add(request)) for request in requests])
    heard: dict[str, list[TokenOutput]] = {}
    for output in run_to_end(EngineCore(scheduler, executor, clock, inbox)):
        heard.setdefault(output.id, []).append(output)
    assert kv.usage().num_used == 0
    return heard


def test_unknown_policy_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"no scheduling policy .lifo.. Known: fcfs, priority"):
        make_policy("lifo", KVCacheManager(1, 1))


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_every_policy_serves_everybody(policy: str) -> None:
    requests = [
        ask(f"r{i:02d}", 0.003 * i, prompt=1 + 7 * i % 40, tenant="ab"[i % 2], priority=i % 3) for i in range(40)
    ]
    heard = serve(policy, requests, seats=4, num_blocks=24)
    assert all(sum(len(o.token_ids) for o in heard[request.id]) == 4 for request in requests)


def test_fcfs_serves_in_order_of_arrival() -> None:
    assert list(serve("fcfs", [ask("late", 0.002), ask("first"), ask("second", 0.001)])) == ["first", "second", "late"]


def test_priority_serves_the_lowest_number_first_and_equals_by_arrival() -> None:
    requests = [
        ask("now"),
        ask("low", 0.001, priority=5),
        ask("high", 0.002, priority=-1),
        ask("low2", 0.003, priority=5),
    ]
    assert list(serve("priority", requests)) == ["now", "high", "low", "low2"]


def test_priority_preempts_the_least_important() -> None:
    requests = [ask("low", priority=1, prompt=30, output=40), ask("high", 0.001, priority=0, prompt=30, output=40)]
    heard = serve("priority", requests, seats=2, num_blocks=24)
    assert (heard["low"][-1].num_preemptions, heard["high"][-1].num_preemptions) == (1, 0)


def test_shortest_lowers_the_mean_time_to_first_token() -> None:
    requests = [ask(f"r{i:02d}", 0.001 * i, prompt=320 if i % 2 else 8, output=1) for i in range(20)]

    def mean_ttft_s(policy: str) -> float:
        heard = serve(policy, requests)
        firsts = {id: next(o.time_s for o in outputs if o.token_ids) for id, outputs in heard.items()}
        return statistics.mean(firsts[request.id] - request.arrival_s for request in requests)

    assert mean_ttft_s("shortest") < 0.8 * mean_ttft_s("fcfs")


def test_shortest_does_not_starve_a_long_prompt() -> None:
    """Short prompts arrive for ever, as fast as they are served; the long one waits no longer than it must."""
    requests = [ask("long", prompt=300), *[ask(f"s{i:03d}", 0.035 * i, prompt=8) for i in range(200)]]
    heard = serve(Shortest(tokens_per_s=200.0), requests)
    assert 1.0 < heard["long"][0].time_s < 2.0  # (300 - 8) tokens / 200 tokens per second, and its own prefill


def test_longest_prefix_follows_the_cache() -> None:
    prefix = [5] * 32
    first = EngineRequest(id="first", token_ids=[*prefix, 1], params=SamplingParams(max_tokens=4), arrival_s=0.0)
    other = ask("other", 0.001, prompt=33)
    alike = EngineRequest(id="alike", token_ids=[*prefix, 2], params=SamplingParams(max_tokens=4), arrival_s=0.002)
    assert list(serve("longest-prefix", [first, other, alike])) == ["first", "alike", "other"]
    assert list(serve("fcfs", [first, other, alike])) == ["first", "other", "alike"]


def test_longest_prefix_does_not_starve_the_unlike() -> None:
    kv = KVCacheManager(256, 4)
    alike = [
        EngineRequest(id=f"a{i:03d}", token_ids=[5] * 32 + [i], params=SamplingParams(max_tokens=4), arrival_s=0.03 * i)
        for i in range(100)
    ]
    heard = serve_with(CachedPrefixFirst(kv, patience_s=0.5), kv, [*alike, ask("other", 0.001, prompt=33)])
    assert 0.4 < heard["other"][0].time_s < 0.7


def serve_with(
    policy: SchedulingPolicy, kv: KVCacheManager, requests: list[EngineRequest]
) -> dict[str, list[TokenOutput]]:
    clock = VirtualClock()
    limits = SchedulerLimits(max_model_len=1024, max_num_seqs=1, max_num_batched_tokens=32)
    inbox = TraceInbox(clock, [(request.arrival_s, Add(request)) for request in requests])
    executor = SimExecutor(clock, lambda step: STEP_S)
    heard: dict[str, list[TokenOutput]] = {}
    for output in run_to_end(EngineCore(Scheduler(kv, limits, policy=policy), executor, clock, inbox)):
        heard.setdefault(output.id, []).append(output)
    return heard


def test_deadline_serves_the_most_urgent_first() -> None:
    requests = [
        ask("now"),
        ask("calm", 0.001, deadline_s=9.0),
        ask("urgent", 0.002, deadline_s=0.2),
        ask("none", 0.003),
    ]
    assert list(serve("deadline", requests)) == ["now", "urgent", "calm", "none"]


def test_deadline_keeps_more_promises_than_fcfs_and_than_plain_earliest_first_under_overload() -> None:
    requests = [ask(f"r{i:03d}", 0.02 * i, deadline_s=0.02 * i + (0.1 if i % 2 else 1.0)) for i in range(80)]

    def kept(policy: str | SchedulingPolicy) -> int:
        heard = serve(policy, requests)
        return sum(heard[r.id][0].time_s <= (r.deadline_s or 0.0) for r in requests)

    renewed, plain, fcfs = kept("deadline"), kept(Deadline(grace_s=1e-9)), kept("fcfs")
    assert renewed > plain > 0
    assert renewed > 2 * fcfs


def test_a_missed_deadline_comes_up_again() -> None:
    """Urgent requests arrive for ever; one that missed is renewed and served within its grace."""
    requests = [ask(f"r{i:03d}", 0.04 * i, deadline_s=0.04 * i + 0.3) for i in range(200)]
    requests.append(ask("missed", 0.5, deadline_s=0.501))
    heard = serve(Deadline(grace_s=1.0), requests)
    assert 0.6 < heard["missed"][0].time_s < 2.0


def test_fair_share_gives_a_quiet_tenant_its_half() -> None:
    """One tenant floods, the other sends one request at a time: under fcfs it would wait for the whole flood."""
    flood = [ask(f"f{i:03d}", 0.0, tenant="flood") for i in range(50)]
    quiet = [ask(f"q{i}", 0.1 + 0.2 * i, tenant="quiet") for i in range(5)]

    def worst_wait_s(policy: str) -> float:
        heard = serve(policy, flood + quiet)
        return max(heard[r.id][0].time_s - r.arrival_s for r in quiet)

    assert worst_wait_s("fair") <= 6 * STEP_S  # at most one request of the flood, and its own first step
    assert worst_wait_s("fcfs") > 1.0


def test_fair_share_counts_tokens_not_requests() -> None:
    long = [ask(f"l{i:02d}", prompt=28, tenant="long") for i in range(20)]
    short = [ask(f"s{i:02d}", prompt=4, output=4, tenant="short") for i in range(60)]
    order = list(serve("fair", long + short))
    share = sum(id.startswith("s") for id in order[:30]) / 30
    assert 0.7 < share < 0.9  # 7 tokens each against 31


def test_fair_share_saves_up_nothing_while_idle() -> None:
    """A tenant that was away is not served exclusively when it returns."""
    busy = [ask(f"b{i:02d}", tenant="busy") for i in range(40)]
    back = [ask(f"z{i:02d}", 1.0, tenant="back") for i in range(20)]
    order = list(serve("fair", busy + back))
    first = order.index("z00")
    assert 7 <= sum(id.startswith("z") for id in order[first : first + 16]) <= 9
