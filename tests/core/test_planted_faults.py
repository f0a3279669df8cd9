"""The property test is worth something only if it notices faults: plant them, one at a time, and see."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import pytest
from core_device import Config
from core_world import play

from planted_faults import Fault, Faults, assert_caught, changed, does_nothing
from powerband.core.block_pool import BlockPool
from powerband.core.kv_cache import KVCacheManager, PrefixMatch
from powerband.core.loop import EngineCore
from powerband.core.request import cache_root, new_request
from powerband.core.results import new_prompt_rows, take_tokens
from powerband.core.scheduler import Scheduler
from powerband.core.step import FinishReason

FAULTS = Faults()
UNLIMITED = 10**9


def play_traces() -> None:
    for seed in range(3):
        play(
            Config(
                seed=seed,
                overlap=True,
                num_blocks=28,
                failures=0.02,
                drafts=True,
                interruptions=True,
                policy="fair",
            )
        )
        play(Config(seed=seed, overlap=True, num_blocks=128, max_num_seqs=6))
        play(Config(seed=seed, overlap=True, num_blocks=64, grammars=True))
        play(Config(seed=seed, overlap=True, num_blocks=40, chunk=8, policy="longest-prefix", burst=True))
        play(Config(seed=seed, num_blocks=28, drafts=True))
        play(Config(seed=seed, num_blocks=99, budget=16, policy="priority", burst=True))
        play(Config(seed=seed, overlap=True, num_blocks=150, budget=24, failures=0.05, burst=True))
    for seed in (5, 27):
        play(Config(seed=seed, overlap=True, num_blocks=90, windowed=2, window=9, failures=0.02, burst=True))
        play(Config(seed=seed, num_blocks=40, chunk=8, full=0, windowed=1, window=6, drafts=True))
        play(Config(seed=seed, num_stages=4, num_blocks=150, budget=24, chunk=8, failures=0.05, burst=True))


# Epochs and results


@FAULTS.add("results of an older epoch count", Scheduler.update)
def _(right: Any, scheduler: Any, step: Any, result: Any, now: float) -> Any:
    for work in step.works:
        if work.id in scheduler.requests:
            work.epoch = scheduler.requests[work.id].epoch
    return right(scheduler, step, result, now)


@FAULTS.add("preemption keeps the epoch", Scheduler._preempt)
def _(right: Any, scheduler: Any, r: Any) -> None:
    epoch = r.epoch
    right(scheduler, r)
    r.epoch = epoch


@FAULTS.add("a request with a reused id keeps its epoch", new_request)
def _(right: Any, source: Any, *, epoch: int, **others: Any) -> Any:
    return right(source, epoch=0 * epoch, **others)


@FAULTS.add("preemption keeps pending tokens", Scheduler._preempt)
def _(right: Any, scheduler: Any, r: Any) -> None:
    pending = r.num_pending
    right(scheduler, r)
    r.num_pending = pending


@FAULTS.add("rejected drafts count as computed", take_tokens)
def _(right: Any, r: Any, work: Any, got: Any, forced: Any, **end: Any) -> Any:
    computed = r.num_computed
    taken = right(r, work, got, forced, **end)
    r.num_computed = computed
    return taken


@FAULTS.add("tokens after a stop are reported", take_tokens)
def _(right: Any, r: Any, work: Any, got: Any, forced: Any, **end: Any) -> Any:
    kept, finish, stop_token = right(r, work, got, forced, **end)
    return [*got, *forced] if finish is FinishReason.STOP else kept, finish, stop_token


@FAULTS.add("min_tokens is ignored", take_tokens)
def _(right: Any, r: Any, work: Any, got: Any, forced: Any, **end: Any) -> Any:
    with changed(r, params=replace(r.params, min_tokens=0)):
        return right(r, work, got, forced, **end)


@FAULTS.add("one token too many", take_tokens)
def _(right: Any, r: Any, work: Any, got: Any, forced: Any, **end: Any) -> Any:
    with changed(r, max_length=r.max_length + 1):
        return right(r, work, got, forced, **end)


@FAULTS.add("forced tokens count as computed", take_tokens)
def _(right: Any, r: Any, work: Any, got: Any, forced: Any, **end: Any) -> Any:
    taken = right(r, work, got, forced, **end)
    r.num_computed += len(forced)
    return taken


@FAULTS.add("forced tokens that are cut off end their grammar", take_tokens)
def _(right: Any, r: Any, work: Any, got: Any, forced: Any, *, is_complete: bool) -> Any:
    kept, finish, stop_token = right(r, work, got, forced, is_complete=is_complete)
    return kept, FinishReason.STOP if is_complete else finish, stop_token


@FAULTS.add("prompt log-probabilities are reported twice", new_prompt_rows)
def _(right: Any, r: Any, work: Any, rows: Any) -> Any:
    right(r, work, rows)
    return rows or None


@FAULTS.add("an aborted request goes on", Scheduler.abort)
def _(right: Any, scheduler: Any, *arguments: Any) -> Any:
    with changed(scheduler, _finish=does_nothing):
        return right(scheduler, *arguments)


@FAULTS.add("results in flight are forgotten", EngineCore._finish_oldest)
def _(right: Any, core: Any) -> Any:
    right(core)
    return []


# The prefix cache


@FAULTS.add("a block is offered before it is full", KVCacheManager._num_publishable)
def _(right: Any, kv: Any, r: Any) -> Any:
    with changed(r, num_computed=len(r.tokens)):
        return right(kv, r)


@FAULTS.add("blocks in doubt are offered again", KVCacheManager._num_publishable)
def _(right: Any, kv: Any, r: Any) -> Any:
    with changed(r, max_published=UNLIMITED):
        return right(kv, r)


FAULTS.add("hits are not held", BlockPool.hold)(does_nothing)


@FAULTS.add("a whole prompt is matched", KVCacheManager.matching_blocks)
def _(right: Any, kv: Any, r: Any) -> Any:
    blocks = right(kv, r)
    i = len(blocks)
    if (i + 1) * kv.block_size == len(r.tokens) and len(r.block_keys) > i and r.block_keys[i] in kv.pool.block_of:
        blocks.append(kv.pool.block_of[r.block_keys[i]])
    return blocks


@FAULTS.add("idle hits count as free", KVCacheManager.fits)
def _(right: Any, kv: Any, r: Any, match: PrefixMatch, running: Any = ()) -> Any:
    return right(kv, r, PrefixMatch(match.blocks, 0), running)


@FAULTS.add("prompt log-probabilities read the cache", KVCacheManager.matching_blocks)
def _(right: Any, kv: Any, r: Any) -> Any:
    with changed(r, uses_prefix_cache=True):
        return right(kv, r)


@FAULTS.add("keys are not chained", KVCacheManager._extend_keys)
def _(_right: Any, kv: Any, r: Any) -> None:
    size = kv.block_size
    for i in range(len(r.block_keys), len(r.tokens) // size):
        block = repr(r.tokens[i * size : (i + 1) * size]).encode()
        r.block_keys.append(hashlib.sha256(r.salt + block).digest())


@FAULTS.add("the head of a prefix is evicted first", KVCacheManager.release)
def _(right: Any, kv: Any, r: Any) -> None:
    blocks = list(r.blocks)
    right(kv, r)
    for block in blocks:
        kv.pool.touch(block)


FAULTS.add("another request's block with the same content grows old", BlockPool.touch)(does_nothing)


FAULTS.add("what rests on a failed request stays findable", KVCacheManager.forget_since)(does_nothing)


@FAULTS.add("a failed request offers its blocks again", KVCacheManager.invalidate)
def _(right: Any, kv: Any, r: Any, first: int) -> Any:
    return right(kv, r, UNLIMITED)


@FAULTS.add("a reset forgets nothing of running requests", KVCacheManager.reset)
def _(right: Any, kv: Any, _holders: Any = ()) -> None:
    right(kv)


@FAULTS.add("tenants share a cache", cache_root)
def _(right: Any, _tenant: str, cache_salt: str, *others: Any) -> Any:
    return right("", cache_salt, *others)


@FAULTS.add("cache salts are ignored", cache_root)
def _(right: Any, tenant: str, _cache_salt: str, *others: Any) -> Any:
    return right(tenant, "", *others)


@FAULTS.add("evicted blocks stay findable", BlockPool.take)
def _(right: Any, pool: Any, count: int) -> Any:
    with changed(pool, _remove_key=does_nothing):
        return right(pool, count)


@FAULTS.add("a key is given to two blocks", BlockPool.publish)
def _(right: Any, pool: Any, block: int, key: bytes, parent: bytes) -> None:
    if pool.key_of[block] is None:
        pool.block_of.pop(key, None)
    right(pool, block, key, parent)


# Blocks, seats and the token budget


@FAULTS.add("an ended request keeps its blocks", Scheduler._finish)
def _(right: Any, scheduler: Any, r: Any) -> None:
    with changed(scheduler.kv, release=does_nothing):
        right(scheduler, r)


@FAULTS.add("running requests may exceed the token budget", Scheduler._continue_running)
def _(right: Any, scheduler: Any, works: Any) -> Any:
    limits = scheduler.limits
    twice = replace(limits, max_num_batched_tokens=2 * limits.max_num_batched_tokens)
    with changed(scheduler, limits=twice):
        left, preempted = right(scheduler, works)
    return left - limits.max_num_batched_tokens, preempted


@FAULTS.add("new requests may exceed the token budget", Scheduler._start_waiting)
def _(right: Any, scheduler: Any, works: Any, budget: int, now: float) -> None:
    right(scheduler, works, 2 * budget, now)


FAULTS.add("prefills eat the budget of decodes", Scheduler._count_decodes)(lambda *_: 0)


@FAULTS.add("chunks are as long as the budget", Scheduler._continue_running)
def _(right: Any, scheduler: Any, works: Any) -> Any:
    with changed(scheduler, _chunk=UNLIMITED):
        return right(scheduler, works)


@FAULTS.add("first chunks are as long as the budget", Scheduler._start_waiting)
def _(right: Any, scheduler: Any, *arguments: Any) -> None:
    with changed(scheduler, _chunk=UNLIMITED):
        right(scheduler, *arguments)


@FAULTS.add("requests with a grammar do not wait for their last token", new_request)
def _(right: Any, source: Any, **settings: Any) -> Any:
    r = right(source, **settings)
    r.waits_for_token = False
    return r


@FAULTS.add("the end of a grammar ends nothing", Scheduler.update)
def _(right: Any, scheduler: Any, step: Any, result: Any, now: Any) -> Any:
    return right(scheduler, step, replace(result, complete=set()), now)


@FAULTS.add("any number of samples may be unconfirmed", Scheduler._continue_running)
def _(right: Any, scheduler: Any, works: Any) -> Any:
    with changed(scheduler, relay=UNLIMITED):
        return right(scheduler, works)


@FAULTS.add("a request is scheduled on top of drafts", Scheduler._work)
def _(right: Any, scheduler: Any, r: Any, *arguments: Any) -> Any:
    work = right(scheduler, r, *arguments)
    r.drafting = False
    return work


@FAULTS.add("pending tokens may pass the end", Scheduler._continue_running)
def _(right: Any, scheduler: Any, works: Any) -> Any:
    requests = list(scheduler.running)
    ends = [r.max_length for r in requests]
    for r in requests:
        r.max_length = UNLIMITED
    try:
        return right(scheduler, works)
    finally:
        for r, end in zip(requests, ends, strict=True):
            r.max_length = end


@FAULTS.add("one request too many runs", Scheduler._start_waiting)
def _(right: Any, scheduler: Any, *arguments: Any) -> None:
    limits = scheduler.limits
    with changed(scheduler, limits=replace(limits, max_num_seqs=limits.max_num_seqs + 1)):
        right(scheduler, *arguments)


@FAULTS.add("the first in order is preempted", Scheduler._grow)
def _(right: Any, scheduler: Any, *arguments: Any) -> Any:
    preempt = scheduler._preempt
    with changed(scheduler, _preempt=lambda _victim: preempt(scheduler.running[0])):
        return right(scheduler, *arguments)


@FAULTS.add("preempted tokens are not counted as waiting", Scheduler._preempt)
def _(right: Any, scheduler: Any, r: Any) -> None:
    right(scheduler, r)
    scheduler._num_waiting_tokens -= len(r.tokens)


@FAULTS.add("pause is ignored", Scheduler.schedule)
def _(right: Any, scheduler: Any, now: float) -> Any:
    with changed(scheduler, paused=False):
        return right(scheduler, now)


# Failures, and what the device is told


@FAULTS.add("the device does not learn that a request ended", Scheduler._finish)
def _(right: Any, scheduler: Any, r: Any) -> None:
    right(scheduler, r)
    scheduler._dropped.remove(r.id)


@FAULTS.add("a failed step loses what the device was to drop", Scheduler.fail)
def _(right: Any, scheduler: Any, step: Any, *arguments: Any) -> Any:
    step.dropped = []
    return right(scheduler, step, *arguments)


@FAULTS.add("a failed step leaves its blocks findable", Scheduler.fail)
def _(right: Any, scheduler: Any, *arguments: Any) -> Any:
    with changed(scheduler.kv, reset=does_nothing):
        return right(scheduler, *arguments)


@FAULTS.add("a failed step leaves other requests running", Scheduler.fail)
def _(right: Any, scheduler: Any, *arguments: Any) -> Any:
    with changed(scheduler, _preempt=does_nothing):
        return right(scheduler, *arguments)


FAULTS.add("readers of a failed request go on", Scheduler._readers)(lambda *_: [])


# Windows


@FAULTS.add("pages are freed a position too early", KVCacheManager._free_passed)
def _(right: Any, kv: Any, r: Any) -> None:
    with changed(kv, layout=replace(kv.layout, window=kv.layout.window - 1)):
        right(kv, r)


FAULTS.add("pages stay when their window has passed", KVCacheManager._free_passed)(does_nothing)


@FAULTS.add("a prefix is found without what its last token sees", KVCacheManager._end_of_windows)
def _(_right: Any, _kv: Any, _r: Any, count: int) -> int:
    return count


@FAULTS.add("groups share their pages", KVCacheManager._find)
def _(right: Any, kv: Any, *arguments: Any) -> Any:
    with changed(kv, _suffixes=[b""] * kv.num_groups):
        return right(kv, *arguments)


@FAULTS.add("pages that have passed are not given back", BlockPool.release)
def _(right: Any, pool: Any, block: int) -> None:
    if pool.refs[block] != 1 or pool.step % 3:
        right(pool, block)


def test_play_passes_without_a_fault() -> None:
    play_traces()


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_play_catches(fault: Fault) -> None:
    assert_caught(fault, play_traces)
