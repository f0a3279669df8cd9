"""Fast-forward for simulations: while all running requests only decode, consecutive steps are identical.

    round      1 ... 2 ... last     each round of the loop adds one token to every running request
    request a  +1    +1    ends     no request arrives, starts or is preempted; requests end only in the last round
    request b  +1    +1    +1 [B]   [B]: takes a block and publishes full ones, in the order of single steps

The state afterwards equals that of single steps, block for block; tests/planner/test_fast_forward.py compares the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from powerband.core.kv_cache import KVCacheManager
from powerband.core.loop import EngineCore, InFlight
from powerband.core.request import Request
from powerband.core.scheduler import Scheduler
from powerband.core.step import FinishReason, Step, StepHandle, TokenOutput, Work

TokensOf = Callable[[Request, int, int], Iterable[int]]  # the tokens that a request has at positions [start, end)


def steady_rounds(core: EngineCore) -> int:
    """How many rounds can be applied at once while no command arrives. Requests end only in the last of them.

    0 with drafts, with pipeline stages and with a policy whose order changes over time.
    """
    scheduler = core.scheduler
    relay, running = scheduler.relay, scheduler.running
    is_plain = not scheduler.policy.dynamic and scheduler.propose is None and scheduler.num_stages == 1
    if not is_plain or scheduler.paused or len(core.inflight) != relay or core.executor.depth != relay + 1:
        return 0
    max_rounds = 1 << 30
    for r in running:
        known = len(r.tokens)
        if r.inflight != relay or known + r.num_pending - r.num_computed != 1 or r.stop_ids:
            return 0
        if r.max_length - known < max_rounds:
            max_rounds = r.max_length - known
    if not running or _may_start(scheduler):
        return 0
    if relay and len(ending(running, max_rounds)) == len(running):
        max_rounds -= 1  # the last round would have no step
    return _within_memory(scheduler, max_rounds)


def ending(running: Iterable[Request], rounds: int) -> list[Request]:
    """Requests that get their last token in the last of these rounds. With overlap, that round's step omits them."""
    return [r for r in running if r.max_length - len(r.tokens) == rounds]


def advance(
    core: EngineCore, rounds: int, tokens_of: TokensOf, inflight: tuple[StepHandle, float] | None, now: float
) -> list[TokenOutput]:
    """Apply `rounds` of the `steady_rounds`; return the final outputs of the requests that ended.

    `now` is when the last round ends. With overlap, `inflight` is the handle and the submission time of its step.
    """
    scheduler = core.scheduler
    kv, running = scheduler.kv, scheduler.running
    size, ended = kv.block_size, ending(running, rounds)
    skipped = {r.id for r in ended} if inflight is not None else ()
    known = [len(r.tokens) for r in running]
    computed = [r.num_computed for r in running]
    steps = [rounds - (r.id in skipped) for r in running]
    grown = [(step, i) for i, r in enumerate(running) for step in range(r.capacity - r.num_computed, steps[i], size)]
    grown.sort()
    for step, i in grown:
        r = running[i]
        r.tokens.extend(tokens_of(r, len(r.tokens), known[i] + step))
        r.num_computed = computed[i] + step
        kv.allocate(r, 1)
        r.num_computed += 1
        kv.publish(r)
    for i, r in enumerate(running):
        r.tokens.extend(tokens_of(r, len(r.tokens), known[i] + rounds))
        r.num_computed = computed[i] + steps[i]
    scheduler.counters.num_steps += rounds
    scheduler.counters.generation_tokens += rounds * len(running)
    if inflight is not None:
        works = [Work(r.id, r.epoch, r.num_computed - 1, 1, [], True) for r in running if r.id not in skipped]
        core.inflight.clear()
        core.inflight.append(InFlight(Step(scheduler.counters.num_steps, works), *inflight))
    outputs = [scheduler.abort(r.id, FinishReason.LENGTH, now) for r in ended]
    return [output for output in outputs if output is not None]


def _may_start(scheduler: Scheduler) -> bool:
    """Whether the first waiting request starts in the next round, or could start in a later one."""
    running, kv = scheduler.running, scheduler.kv
    limits = scheduler.limits
    if not scheduler.waiting or len(running) >= min(limits.max_num_seqs, limits.max_num_batched_tokens):
        return False
    r = scheduler.waiting[0]
    match = kv.match(r)
    if kv.fits(r, match, running):
        return True
    if any(_gives_back(q, kv) for q in running):
        return True
    # The number of free blocks only falls, so it can fit later only by sharing more blocks than now: if a running
    # request computes the very block that comes next in its own prompt.
    place, last = len(match.blocks) // kv.num_groups, (len(r.tokens) - 1) // kv.block_size
    if not kv.prefix_caching or place >= last:
        return False
    if kv.layout.windowed:  # any request that computes a later block may provide the windows that it needs
        return any(q.num_published < last and _share_prefix(q, r, q.num_published) for q in running)
    return any(q.num_published <= place and _share_prefix(q, r, place) for q in running)


def _gives_back(q: Request, kv: KVCacheManager) -> bool:
    """Whether a running request still holds more of its windows than decoding needs: its prompt's last chunk."""
    blocks = len(q.blocks) // kv.num_groups
    return kv.layout.windowed > 0 and blocks - q.num_passed > kv.layout.blocks_before + 1


def _share_prefix(q: Request, r: Request, num_blocks: int) -> bool:
    """Whether their first blocks are equal, as far as `q` has keys for them."""
    place = min(num_blocks, len(q.block_keys))
    return q.block_keys[place - 1] == r.block_keys[place - 1] if place else q.salt == r.salt


def _within_memory(scheduler: Scheduler, max_rounds: int) -> int:
    """How many of `max_rounds` the free blocks suffice for."""
    free, size = scheduler.kv.num_free, scheduler.kv.block_size
    room = [r.capacity - r.num_computed for r in scheduler.running]  # rounds until each request needs a block

    def blocks(rounds: int) -> int:
        return sum((rounds - 1 - first) // size + 1 for first in room if first < rounds)

    low, high = 0, max_rounds
    if blocks(max_rounds) <= free:
        return max_rounds
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if blocks(middle) <= free else (low, middle)
    return low
