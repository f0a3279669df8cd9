"""A world for the core: traces that provoke, and a listener that holds every output against what it must be."""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict, deque
from dataclasses import dataclass, replace

from core_device import LAST_OF_GRAMMAR, MAX_MODEL_LEN, VOCABULARY, CheckingExecutor, Config, follow, next_token

from powerband.core.admission import SchedulerLimits
from powerband.core.clock import VirtualClock
from powerband.core.kv_cache import KVCacheManager
from powerband.core.loop import Abort, Add, Call, Command, EngineCore
from powerband.core.params import SamplingParams
from powerband.core.policy import make_policy
from powerband.core.request import EngineRequest, Request, cache_root
from powerband.core.scheduler import Scheduler
from powerband.core.simulation import TraceInbox
from powerband.core.step import FinishReason, TokenOutput

STOP_TOKEN = 3


@dataclass
class Report:
    steps: str  # digest of every step
    num_steps: int
    num_preemptions: int
    num_cached: int
    finished: dict[FinishReason, int]
    seconds: float


def root(request: EngineRequest) -> int:
    text = f"{len(request.tenant)}:{request.tenant}{request.cache_salt}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def reference(request: EngineRequest, longest: int) -> tuple[list[int], FinishReason]:
    """What the request must yield, computed alone and in the plainest way."""
    params, digest, output = request.params, root(request), []
    for token in request.token_ids:
        digest = follow(digest, token)
    while True:
        token = next_token(digest)
        output.append(token)
        digest = follow(digest, token)
        stops = (params.stop_token_ids or []) + ([] if params.ignore_eos else params.eos_token_ids or [])
        if params.grammar is not None and token == LAST_OF_GRAMMAR:
            return output, FinishReason.STOP
        if token in stops and len(output) >= params.min_tokens:
            return output, FinishReason.STOP
        if len(output) == params.max_tokens or len(request.token_ids) + len(output) >= longest:
            return output, FinishReason.LENGTH


def longest_of(config: Config) -> int:
    return min(MAX_MODEL_LEN, config.layout.max_tokens(config.num_blocks))


def trace(config: Config) -> tuple[list[EngineRequest], list[tuple[float, Command]]]:
    """Requests with shared prefixes, equal blocks behind different prefixes, tenants, ids used twice, aborts."""
    rng, moved = random.Random(f"trace {config.seed}"), random.Random(f"moved {config.seed}")
    formed = random.Random(f"formed {config.seed}")
    pages = [[rng.randrange(VOCABULARY) for _ in range(config.block_size)] for _ in range(3)]
    prefixes = [[t for _ in range(15) for t in rng.choice(pages)][: rng.randrange(5, 60)] for _ in range(4)]
    requests: list[EngineRequest] = []
    events: list[tuple[float, Command]] = []
    for i in range(config.num_requests):
        prefix, at = rng.choice(prefixes), rng.random() * config.num_requests / 60
        if config.burst:
            at = round(at, 1)
            prefix = prefixes[int(at * 10) % len(prefixes)]
            at += rng.randrange(4) * 0.01
        prompt = prefix[: rng.randrange(1, 60)] + [rng.randrange(VOCABULARY) for _ in range(rng.randrange(30))]
        max_tokens = rng.choice([None, 1, 2, *range(3, 70)])
        params = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min(rng.choice([0, 0, 5]), max_tokens or 5),
            eos_token_ids=[STOP_TOKEN],
            stop_token_ids=[STOP_TOKEN + 1] if rng.random() < 0.5 else None,
            ignore_eos=rng.random() < 0.5,
            prompt_logprobs=0 if rng.random() < 0.08 else None,
            logprobs=0,
            grammar="start: /a/" if config.grammars and formed.random() < 0.5 else None,
        )
        request = EngineRequest(
            id=f"r{i:03d}",
            token_ids=prompt,
            params=params,
            arrival_s=at,
            priority=rng.randrange(3),
            tenant=rng.choice(["", "", "", "x"]),
            cache_salt=rng.choice(["", "", "", "", "s"]),
            deadline_s=at + rng.random() if rng.random() < 0.5 else None,
        )
        if config.moved and moved.random() < 0.3:
            output, _ = reference(request, longest_of(config))
            request = replace(request, resumed_ids=output[: moved.randrange(len(output))])
        requests.append(request)
        events.append((at, Add(request)))
        if config.aborts and rng.random() < 0.25:
            later = at + rng.random() * rng.choice([0.1, 2])
            events.append((later, Abort(request.id)))
            if rng.random() < 0.5:
                again = replace(request, token_ids=prompt[::-1], resumed_ids=[], arrival_s=later)
                requests.append(again)
                events.append((later, Add(again)))
    return requests, sorted(events, key=lambda event: event[0])


def build(config: Config, events: list[tuple[float, Command]], roots: dict[str, int]) -> EngineCore:
    clock = VirtualClock()
    executor = CheckingExecutor(config, clock, roots)
    kv = KVCacheManager(
        config.num_blocks, config.block_size, prefix_caching=config.prefix_caching, layout=config.layout
    )
    limits = SchedulerLimits(
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.budget,
        long_prefill_token_threshold=config.chunk,
        max_num_queued_reqs=config.max_num_queued_reqs,
    )
    rng = random.Random(9)

    def propose(r: Request) -> list[int]:
        digest = roots[r.id]
        for token in r.tokens:
            digest = follow(digest, token)
        return [next_token(digest), rng.randrange(VOCABULARY)]

    scheduler = Scheduler(
        kv,
        limits,
        policy=make_policy(config.policy, kv),
        relay=executor.relay,
        num_stages=config.num_stages,
        propose=propose if config.drafts else None,
    )

    def reset() -> None:
        scheduler.reset_prefix_cache()
        executor.stale = {(r.id, r.epoch) for r in scheduler.running}

    if config.interruptions:
        for at in (0.15, 0.4, 0.8, 1.2):
            events += [(at, Call(scheduler.pause)), (at + 0.05, Call(scheduler.resume))]
            events.append((at + 0.1, Call(reset)))
    executor.scheduler = scheduler
    return EngineCore(scheduler, executor, clock, TraceInbox(clock, events))


def play(config: Config) -> Report:
    """Run a trace to its end. Raises AssertionError if anything at all was wrong."""
    requests, events = trace(config)
    roots = {request.id: root(request) for request in requests}
    core = build(config, events, roots)
    story = Story(config, requests)
    executor = core.executor
    assert isinstance(executor, CheckingExecutor)
    executor.salts = {cache_root(request.tenant, request.cache_salt) for request in requests}
    for _ in range(20_000):
        if not core.busy:
            break
        for output in core.step():
            story.hear(output, core.clock.now())
        check_books(core)
    else:
        raise AssertionError("the trace does not end")
    check_rest(core, executor)
    story.check_end(executor.failed)
    return Report(
        steps=executor.steps.hexdigest(),
        num_steps=executor.num_steps,
        num_preemptions=core.scheduler.stats().num_preemptions,
        num_cached=core.scheduler.stats().prefix_hits,
        finished=dict(story.finished),
        seconds=core.clock.now(),
    )


def check_books(core: EngineCore) -> None:
    scheduler, executor = core.scheduler, core.executor
    assert isinstance(executor, CheckingExecutor)
    kv = scheduler.kv
    kv.check(scheduler.running)
    assert len(scheduler.running) <= scheduler.limits.max_num_seqs
    assert scheduler.stats().num_waiting_tokens == sum(len(r.tokens) for r in scheduler.waiting)
    assert {r.id for r in scheduler.running + scheduler.waiting} == set(scheduler.requests)
    for r in scheduler.running:
        first_writable = min(r.num_computed, len(r.tokens)) // kv.block_size * kv.num_groups
        held = [block for block in r.blocks if block >= 0]
        writable = [block for block in r.blocks[first_writable:] if block >= 0]
        assert all(kv.pool.refs[block] == 1 for block in writable), "a writable block is shared"
        if (r.id, r.epoch) in executor.stale:
            assert not any(kv.pool.key_of[block] for block in held), "content from before the reset is findable"
        check_windows(core, r)
    assert not any(r.blocks for r in scheduler.waiting)
    # A failure may take a block away from those behind it. They are then not found any more, and evicted in their turn.
    for block in () if executor.failed else kv.pool.cached:
        parent = kv.pool.parent_of[block]
        known = not parent or parent in kv.pool.block_of or parent in executor.salts
        assert known, "a cached block that no prefix leads to"


def check_windows(core: EngineCore, r: Request) -> None:
    """Pages that no token can see any more are given back as soon as a request needs a block."""
    kv = core.scheduler.kv
    layout, blocks = kv.layout, len(r.blocks) // kv.num_groups
    for group in range(kv.num_groups):
        pages = r.blocks[group :: kv.num_groups]
        passed = r.num_passed if group >= layout.full else 0
        assert all(page < 0 for page in pages[:passed]), "a page outlives its window"
        assert all(page >= 0 for page in pages[passed:]), "a page is gone before its time"
    if layout.windowed:
        kept = blocks - r.num_passed
        assert kept <= layout.blocks_before + layout.step_blocks + 1, "a window holds too much"


def check_rest(core: EngineCore, executor: CheckingExecutor) -> None:
    scheduler = core.scheduler
    assert not scheduler.requests
    assert not scheduler.running + scheduler.waiting
    assert scheduler.kv.usage().num_used == 0, "blocks did not come back"
    assert set(executor.requests) <= set(scheduler._dropped), "the device remembers requests for ever"


class Story:
    """Everything the outside was told, held against what each request must yield."""

    def __init__(self, config: Config, requests: list[EngineRequest]) -> None:
        longest = longest_of(config)
        self.expected: dict[str, deque[tuple[EngineRequest, list[int], FinishReason]]] = defaultdict(deque)
        for request in requests:  # an id used twice tells two stories, one after the other
            self.expected[request.id].append((request, *reference(request, longest)))
        self.heard: dict[str, list[int]] = defaultdict(list)
        self.rows: dict[str, list[int]] = defaultdict(list)
        self.finished: dict[FinishReason, int] = defaultdict(int)
        self.errors: set[str] = set()
        self.refused: set[str] = set()

    def hear(self, output: TokenOutput, now: float) -> None:
        assert self.expected[output.id], f"{output.id} speaks after its end"
        request, tokens, reason = self.expected[output.id][0]
        heard, rows = self.heard[output.id], self.rows[output.id]
        assert output.time_s <= now
        if not heard:
            heard += request.resumed_ids
        heard += output.token_ids
        assert heard == tokens[: len(heard)], f"{output.id} yields {heard}, must be {tokens}"
        rows += [int(row.logprobs[0]) for row in output.prompt_logprobs or []]
        assert rows == list(range(1, len(rows) + 1)), "rows of the prompt repeat, or one is missing"
        if output.token_ids:
            assert [row.token_ids[0] for row in output.logprobs or []] == output.token_ids
            assert output.scheduled_s >= request.arrival_s
        if output.finish_reason is not None:
            self.finish(output, request, tokens, reason)

    def finish(self, output: TokenOutput, request: EngineRequest, tokens: list[int], reason: FinishReason) -> None:
        self.finished[FinishReason(output.finish_reason)] += 1
        if output.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            assert (self.heard[output.id], output.finish_reason) == (tokens, reason)
            is_stop_token = reason is FinishReason.STOP and tokens[-1] in (STOP_TOKEN, STOP_TOKEN + 1)
            assert output.stop_token_id == (tokens[-1] if is_stop_token else None)
            if request.params.prompt_logprobs is not None:
                assert len(self.rows[output.id]) == len(request.token_ids) - 1
        if output.finish_reason is FinishReason.ERROR:
            assert output.error is not None
            refused = output.error.code in ("queue_full", "context_length_exceeded")
            (self.refused if refused else self.errors).add(output.id)
        self.expected[output.id].popleft()
        del self.heard[output.id], self.rows[output.id]

    def check_end(self, failed: set[str]) -> None:
        assert not any(self.expected.values()), "a request never ended"
        assert self.errors <= failed, f"failed without a cause: {self.errors - failed}"
