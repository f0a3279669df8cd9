"""A device that checks: it knows what every slot of the KV cache must hold, and what a step may ask of it.

Every slot stores a digest of the whole prefix up to its position (tenant included), not the token: equal blocks behind
different prefixes, stale blocks and leaks between tenants all show. Nothing here knows how the scheduler decides.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

from powerband.core.clock import VirtualClock
from powerband.core.scheduler import Scheduler
from powerband.core.simulation import SimExecutor
from powerband.core.step import ErrorInfo, NewRequest, Step, StepResult, TokenLogprobs, Work
from powerband.spec.kv_layout import KVLayout

LAST_OF_GRAMMAR = 7  # after this token a grammar allows nothing
MAX_FORCED = 9  # tokens that a grammar leaves no choice about
VOCABULARY = 50
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
    grammars: bool = False  # some requests have one
    moved: bool = False  # some requests come from another replica, with a part of their output
    full: int = 1  # groups of layers
    windowed: int = 0
    window: int = 0

    @property
    def layout(self) -> KVLayout:
        return KVLayout(self.block_size, 1, self.full, self.windowed, self.window, self.budget)


def follow(digest: int, token: int) -> int:
    return hash((digest, token))


def in_group(digest: int, group: int) -> int:
    """What a page of this group holds of a position."""
    return digest if digest == GARBAGE or not group else follow(digest, VOCABULARY + group)


def next_token(digest: int) -> int:
    return (digest >> 7) % VOCABULARY


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
        return CheckingHandle(self, step, handle.end_s, handle._result, fails)

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
                relay = 0 if r.params.grammar is not None else self.relay
                stalled = r.id not in chosen and r.num_missing == 1 and r.inflight <= relay and not r.drafting
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
        relay = 0 if r.params.grammar is not None else self.relay
        assert end - len(w.drafts) <= r.num_confirmed + relay, "an input token is not known yet"
        assert w.samples == (end - len(w.drafts) == len(r.digests)), "samples exactly when the last token is reached"
        assert end <= len(r.blocks) // self.config.layout.groups * size, "the block table is too short"
        longest = len(r.prompt) + (r.params.max_tokens or MAX_MODEL_LEN)
        assert len(r.digests) + 1 + len(w.drafts) <= longest or not w.samples, "a token that cannot count"
        digests = r.digests[w.start : end - len(w.drafts)]
        digest = digests[-1]
        for token in w.drafts:
            digest = follow(digest, token)
            digests.append(digest)
        written = set()
        for group in range(self.config.layout.groups):
            for position, digest in zip(range(w.start, end), digests, strict=True):
                slot = self.slot(r, position, group)
                assert slot not in written, "a block occurs twice in a table"
                written.add(slot)
                self.slots[slot] = in_group(digest, group)
        return written

    def slot(self, r: DeviceRequest, position: int, group: int) -> int:
        size, groups = self.config.block_size, self.config.layout.groups
        page = r.blocks[position // size * groups + group]
        assert page >= 0, "a page that is read or written is gone"
        return page * size + position % size

    def attend(self, w: Work, result: StepResult) -> None:
        r, end = self.requests[w.id], w.start + w.num_tokens - len(w.drafts)
        poisoned = False
        read: set[int] = set()
        for group in range(self.config.layout.groups):
            first = 0 if group < self.config.full else max(w.start - self.config.window + 1, 0)
            slots = [self.slot(r, position, group) for position in range(first, end)]
            assert not read & set(slots), "a block occurs twice in a table"
            read |= set(slots)
            want = [in_group(digest, group) for digest in r.digests[first:end]]
            have = [self.slots[slot] for slot in slots]
            if have != want:
                assert GARBAGE in have or GARBAGE in want, f"{w.id}: group {group} holds another context"
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
            tokens = result.tokens[w.id] = self.sampled(r, w, poisoned)
            r.extend(tokens)
            if r.params.grammar is not None:
                forced = result.forced[w.id] = self.forced(r, tokens[-1])
                r.extend(forced)
                tokens = [*tokens, *forced]
                if tokens[-1] == LAST_OF_GRAMMAR:
                    result.complete.add(w.id)
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

    def forced(self, r: DeviceRequest, token: int) -> list[int]:
        """What would be sampled next: after some tokens, a grammar leaves no choice about several more."""
        tokens: list[int] = []
        if token % 3 == 0:
            digest = r.digests[-1]
            while len(tokens) < MAX_FORCED and LAST_OF_GRAMMAR not in tokens:
                tokens.append(next_token(digest))
                digest = follow(digest, tokens[-1])
        return tokens

    def spoil(self, w: Work) -> None:
        r = self.requests.get(w.id)
        if r is not None and self.epochs.get(w.id) == w.epoch:
            for position in range(w.start, w.start + w.num_tokens):
                for group in range(self.config.layout.groups):
                    self.slots[self.slot(r, position, group)] = GARBAGE


class CheckingHandle:
    def __init__(self, executor: CheckingExecutor, step: Step, end_s: float, result: StepResult, fails: bool) -> None:
        self.executor, self.step, self.end_s, self._result, self.fails = executor, step, end_s, result, fails

    def result(self) -> StepResult:
        ex = self.executor
        ex.clock.wait_until(self.end_s + ex.update_s)
        for w in self.step.works:
            if w.samples and ex.epochs.get(w.id) == w.epoch:
                known = [*self._result.tokens[w.id], *self._result.forced.get(w.id, ())]
                ex.requests[w.id].num_confirmed += len(known)
        if self.fails:
            raise Planted("the step failed")
        return self._result
