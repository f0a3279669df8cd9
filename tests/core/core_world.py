"""A world that checks: an executor that knows what every slot of the KV cache must hold, and traces that provoke.

Every slot stores a digest of the whole prefix up to its position (tenant included), not the token: equal blocks behind
different prefixes, stale blocks and leaks between tenants all show. Nothing here knows how the scheduler decides.
"""

from __future__ import annotations

import hashlib
import random
from collections import defaultdict, deque
from dataclasses import dataclass, replace

from powerband.core.admission import SchedulerLimits
from powerband.core.clock import VirtualClock
from powerband.core.kv_cache import KVCacheManager
from powerband.core.loop import Abort, Add, Call, Command, EngineCore
from powerband.core.params import SamplingParams
from powerband.core.policy import make_policy
from powerband.core.request import EngineRequest, Request, cache_root
from powerband.core.scheduler import Scheduler
from powerband.core.simulation import SimExecutor, TraceInbox
from powerband.core.step import ErrorInfo, FinishReason, NewRequest, Step, StepResult, TokenLogprobs, TokenOutput, Work

VOCABULARY = 50
STOP_TOKEN = 3
GARBAGE = -1  # digest of a slot that a failed step may or may not have written
BAD_TOKEN = 10**6  # sampled from garbage: must never reach an output
MAX_MODEL_LEN = 100


@dataclass(frozen=True)
class Config:
    seed: int = 0
    num_requests: int = 40
    num_stages: int = 1
    overlap: bool = False
    num_blocks: int = 64
    block_size: int = 4
    budget: int = 32
    chunk: int = 0
    max_num_seqs: int = 12
    policy: str = "fcfs"
    drafts: bool = False
    prefix_caching: bool = True
    aborts: bool = True
    failures: float = 0.0  # share of steps that fail, and four times the share of works that do
    burst: bool = False  # requests arrive in bursts, so that many share what is being computed
    interruptions: bool = False  # pause, resume, reset of the prefix cache
    max_num_queued_reqs: int = 1000


@dataclass
class Report:
    steps: str  # digest of every step
    num_steps: int
    num_preemptions: int
    num_cached: int
    finished: dict[FinishReason, int]
    seconds: float


def follow(digest: int, token: int) -> int:
    return hash((digest, token))


def next_token(digest: int) -> int:
    return (digest >> 7) % VOCABULARY


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
        if token in stops and len(output) >= params.min_tokens:
            return output, FinishReason.STOP
        if len(output) == params.max_tokens or len(request.token_ids) + len(output) == longest:
            return output, FinishReason.LENGTH


class Planted(Exception):
    """A failure that the world itself causes."""


class DeviceRequest:
    """What a device remembers of one (id, epoch)."""

    def __init__(self, start: int, new: NewRequest, blocks: list[int]) -> None:
        self.digests: list[int] = []  # of tokens[: i + 1]
        self.blocks = blocks
        self.root = start
        self.params = new.params
        self.prompt = new.token_ids[: new.num_prompt_tokens]
        self.num_confirmed = len(new.token_ids)  # tokens whose value the host knows
        self.extend(new.token_ids)

    def extend(self, tokens: list[int]) -> None:
        digest = self.digests[-1] if self.digests else self.root
        for token in tokens:
            digest = GARBAGE if BAD_TOKEN in (token, digest) or digest == GARBAGE else follow(digest, token)
            self.digests.append(digest)


class CheckingExecutor(SimExecutor):
    """Raises AssertionError at the first thing in a step that a device could not do, or would do wrongly."""

    def __init__(self, config: Config, clock: VirtualClock, roots: dict[str, int]) -> None:
        super().__init__(
            clock,
            lambda step: 0.01 + 1e-4 * step.num_tokens,
            num_stages=config.num_stages,
            overlap=config.overlap,
            submit_s=0.002,
            update_s=0.001,
        )
        self.config = config
        self.scheduler: Scheduler  # set by `build`
        self.roots = roots
        self.salts: set[bytes] = set()
        self.random = random.Random(config.seed)
        self.slots = [0] * (config.num_blocks * config.block_size)
        self.requests: dict[str, DeviceRequest] = {}
        self.epochs: dict[str, int] = {}
        self.stale: set[tuple[str, int]] = set()  # (id, epoch) that ran when the cache was reset
        self.failed: set[str] = set()  # ids that were in a failing step or failed by themselves
        self.steps = hashlib.sha256()
        self.violation: Exception | None = None
        self.num_steps = 0

    def submit(self, step: Step) -> CheckingHandle:  # type: ignore[override]  # a handle that also confirms tokens
        try:
            return self.checked(step)
        except Planted:
            raise
        except Exception as error:
            self.violation = error  # the loop would take it for a broken step
            raise

    def check(self) -> None:
        if self.violation is not None:
            raise self.violation

    def checked(self, step: Step) -> CheckingHandle:
        self.num_steps += 1
        self.steps.update(
            repr([(w.id, w.start, w.num_tokens, w.new_blocks, w.samples, w.drafts) for w in step.works]).encode()
        )
        self.check_step(step)
        fails = self.random.random() < self.config.failures
        if fails:
            self.failed.update(w.id for w in step.works)
            if self.random.random() < 0.5:
                raise Planted("submit failed")
        for id in step.dropped:
            self.requests.pop(id, None)
            self.epochs.pop(id, None)
        handle = super().submit(step)
        if fails:  # nobody knows what such a step wrote
            for w in step.works:
                self.spoil(w)
        return CheckingHandle(self, step, handle._end_s, handle._result, fails)

    def check_step(self, step: Step) -> None:
        config = self.config
        assert step.works, "a step must have work"
        assert not self.scheduler.paused, "scheduled while paused"
        assert sum(w.num_tokens for w in step.works) <= config.budget, "token budget exceeded"
        running = self.scheduler.running
        assert len({w.id for w in step.works}) == len(step.works) <= config.max_num_seqs, "works repeat or are too many"
        for w in step.works:
            assert w.num_tokens > 0, "a work must compute something"
            assert w.num_tokens <= (config.chunk or config.budget), "chunk too long"
        if config.num_stages == 1:
            chosen = {w.id for w in step.works}
            for r in running:
                stalled = r.id not in chosen and r.num_missing == 1 and r.inflight <= self.relay and not r.drafting
                assert not stalled or len(r.tokens) + r.num_pending == r.max_length, "a decode had to wait"

    def run(self, step: Step) -> StepResult:
        result = StepResult({})
        written: set[int] = set()
        for w in step.works:  # every layer writes the keys and values of the whole batch first ...
            slots = self.write(w)
            assert not slots & written, "two requests write one slot"
            written |= slots
        for w in step.works:  # ... and then attends
            self.attend(w, result)
        return result

    def write(self, w: Work) -> set[int]:
        size = self.config.block_size
        if w.new is not None:
            self.requests[w.id] = DeviceRequest(self.roots[w.id], w.new, list(w.new_blocks))
            self.epochs[w.id] = w.epoch
            assert w.start % size == 0, "a cached prefix ends at a block's end"
        else:
            assert self.epochs.get(w.id) == w.epoch, "the device does not know this request"
            self.requests[w.id].blocks += w.new_blocks
        r, end = self.requests[w.id], w.start + w.num_tokens
        assert end - len(w.drafts) <= r.num_confirmed + self.relay, "an input token is not known yet"
        assert w.samples == (end - len(w.drafts) == len(r.digests)), "samples exactly when the last token is reached"
        assert end <= len(r.blocks) * size, "the block table is too short"
        longest = len(r.prompt) + (r.params.max_tokens or MAX_MODEL_LEN)
        assert len(r.digests) + 1 + len(w.drafts) <= longest or not w.samples, "a token that cannot count"
        digests = r.digests[w.start : end - len(w.drafts)]
        digest = digests[-1]
        for token in w.drafts:
            digest = follow(digest, token)
            digests.append(digest)
        slots = [self.slot(r, position) for position in range(w.start, end)]
        for slot, digest in zip(slots, digests, strict=True):
            self.slots[slot] = digest
        return set(slots)

    def slot(self, r: DeviceRequest, position: int) -> int:
        return r.blocks[position // self.config.block_size] * self.config.block_size + position % self.config.block_size

    def attend(self, w: Work, result: StepResult) -> None:
        r, end, size = self.requests[w.id], w.start + w.num_tokens - len(w.drafts), self.config.block_size
        assert len(set(r.blocks)) == len(r.blocks), "a block occurs twice in a table"
        poisoned = False
        for i in range(-(-end // size)):
            want = r.digests[i * size : min((i + 1) * size, end)]
            have = self.slots[r.blocks[i] * size : r.blocks[i] * size + len(want)]
            if have != want:
                assert GARBAGE in have or GARBAGE in want, f"{w.id}: block {i} holds another context"
                poisoned = True
        if self.random.random() < self.config.failures / 4:
            self.failed.add(w.id)
            self.spoil(w)
            result.failed[w.id] = ErrorInfo("planted", "planted failure")
            poisoned = True
        if poisoned:
            self.spoil(w)
        if r.params.prompt_logprobs is not None:
            rows = range(w.start + 1, min(w.start + w.num_tokens + 1, len(r.prompt)))
            result.prompt_logprobs[w.id] = [TokenLogprobs([r.prompt[i]], [float(i)], 1) for i in rows]
        if w.samples:
            tokens = self.sampled(r, w, poisoned)
            r.extend(tokens)
            result.tokens[w.id] = tokens
            result.logprobs[w.id] = [TokenLogprobs([token], [-1.0], 1) for token in tokens]

    def sampled(self, r: DeviceRequest, w: Work, poisoned: bool) -> list[int]:
        if poisoned:
            return [BAD_TOKEN]
        tokens, digest = [], r.digests[-1]
        for draft in [*w.drafts, None]:
            tokens.append(next_token(digest))
            if draft != tokens[-1]:
                break
            digest = follow(digest, draft)
        return tokens

    def spoil(self, w: Work) -> None:
        r = self.requests.get(w.id)
        if r is not None and self.epochs.get(w.id) == w.epoch:
            for position in range(w.start, w.start + w.num_tokens):
                self.slots[self.slot(r, position)] = GARBAGE


class CheckingHandle:
    def __init__(self, executor: CheckingExecutor, step: Step, end_s: float, result: StepResult, fails: bool) -> None:
        self.executor, self.step, self.end_s, self._result, self.fails = executor, step, end_s, result, fails

    def result(self) -> StepResult:
        ex = self.executor
        ex.clock.wait_until(self.end_s + ex.update_s)
        for w in self.step.works:
            if w.samples and ex.epochs.get(w.id) == w.epoch:
                ex.requests[w.id].num_confirmed += len(self._result.tokens[w.id])
        if self.fails:
            raise Planted("the step failed")
        return self._result


def trace(config: Config) -> tuple[list[EngineRequest], list[tuple[float, Command]]]:
    """Requests with shared prefixes, equal blocks behind different prefixes, tenants, ids used twice, aborts."""
    rng = random.Random(f"trace {config.seed}")
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
        requests.append(request)
        events.append((at, Add(request)))
        if config.aborts and rng.random() < 0.25:
            later = at + rng.random() * rng.choice([0.1, 2])
            events.append((later, Abort(request.id)))
            if rng.random() < 0.5:
                again = replace(request, token_ids=prompt[::-1], arrival_s=later)
                requests.append(again)
                events.append((later, Add(again)))
    return requests, sorted(events, key=lambda event: event[0])


def build(config: Config, events: list[tuple[float, Command]], roots: dict[str, int]) -> EngineCore:
    clock = VirtualClock()
    executor = CheckingExecutor(config, clock, roots)
    kv = KVCacheManager(config.num_blocks, config.block_size, prefix_caching=config.prefix_caching, record_events=True)
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
    findable: set[bytes] = set()
    for _ in range(20_000):
        if not core.busy:
            break
        for output in core.step():
            story.hear(output, core.clock.now())
        check_books(core, findable)
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


def check_books(core: EngineCore, findable: set[bytes]) -> None:
    scheduler, executor = core.scheduler, core.executor
    assert isinstance(executor, CheckingExecutor)
    kv = scheduler.kv
    kv.check(scheduler.running)
    for event in kv.drain_events():
        assert (event.key in findable) == (event.kind == "removed"), "events tell another story"
        (findable.add if event.kind == "stored" else findable.remove)(event.key)
    assert findable == set(kv.pool.block_of), "events tell another story"
    assert len(scheduler.running) <= scheduler.limits.max_num_seqs
    assert scheduler.stats().num_waiting_tokens == sum(len(r.tokens) for r in scheduler.waiting)
    assert {r.id for r in scheduler.running + scheduler.waiting} == set(scheduler.requests)
    for r in scheduler.running:
        first_writable = min(r.num_computed, len(r.tokens)) // kv.block_size
        assert all(kv.pool.refs[block] == 1 for block in r.blocks[first_writable:]), "a writable block is shared"
        if (r.id, r.epoch) in executor.stale:
            assert not any(kv.pool.key_of[block] for block in r.blocks), "content from before the reset is findable"
    assert not any(r.blocks for r in scheduler.waiting)
    for block in kv.pool.cached:
        parent = kv.pool.parent_of[block]
        assert parent in kv.pool.block_of or parent in executor.salts, "a cached block that no prefix leads to"


def check_rest(core: EngineCore, executor: CheckingExecutor) -> None:
    scheduler = core.scheduler
    assert not scheduler.requests
    assert not scheduler.running + scheduler.waiting
    assert scheduler.kv.usage().num_used == 0, "blocks did not come back"
    assert set(executor.requests) <= set(scheduler.pending_drops), "the device remembers requests for ever"


class Story:
    """Everything the outside was told, held against what each request must yield."""

    def __init__(self, config: Config, requests: list[EngineRequest]) -> None:
        longest = min(MAX_MODEL_LEN, config.num_blocks * config.block_size)
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
            assert output.stop_token_id == (tokens[-1] if reason is FinishReason.STOP else None)
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
