"""Many steps at once, for simulations: while every running request only decodes, one round of the loop is as the other.

    round      plan ... plan ... last    plan: known before, from what the scheduler holds now
    requests   a  +1     +1       end    nobody comes, starts or is preempted; requests end in the last round only
               b  +1     +1    ▕B▏+1     B: a block is taken, full ones are offered, in the order of single steps

What comes out is equal to single steps, block for block. tests/planner/test_jump.py holds the two against each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from powerband.core.loop import EngineCore, InFlight
from powerband.core.request import Request
from powerband.core.scheduler import Scheduler
from powerband.core.step import FinishReason, Step, StepHandle, TokenOutput, Work

TokensOf = Callable[[Request, int, int], Iterable[int]]  # the tokens that a request has at positions [start, end)


def steady_rounds(core: EngineCore) -> int:
    """How many rounds can be foreseen, as long as no command comes. Whoever is due to end does so in the last of them.

    With drafts, pipeline stages or a policy whose order changes with time: none.
    """
    scheduler = core.scheduler
    relay, running = scheduler.relay, scheduler.running
    is_plain = not scheduler.policy.dynamic and scheduler.propose is None and scheduler.num_stages == 1
    if not is_plain or scheduler.paused or len(core.inflight) != relay or core.executor.depth != relay + 1:
        return 0
    most = 1 << 30
    for r in running:
        known = len(r.tokens)
        if r.inflight != relay or known + r.num_pending - r.num_computed != 1 or r.stop_ids:
            return 0
        if r.max_length - known < most:
            most = r.max_length - known
    if not running or _may_start(scheduler):
        return 0
    if relay and len(ending(running, most)) == len(running):
        most -= 1  # in the last round there would be no step
    return _within_memory(scheduler, most)


def ending(running: Iterable[Request], rounds: int) -> list[Request]:
    """Those that get their last token in the last of these rounds. In overlap they are in no step of that round."""
    return [r for r in running if r.max_length - len(r.tokens) == rounds]


def advance(
    core: EngineCore, rounds: int, tokens_of: TokensOf, inflight: tuple[StepHandle, float] | None, now: float
) -> list[TokenOutput]:
    """Do that many of the `steady_rounds`, the last of which ends at `now`; return the last outputs of who has ended.

    inflight: in overlap, handle and submission of the last round's step.
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
    """Whether the first that waits starts in the next round, or might in a later one."""
    running, kv = scheduler.running, scheduler.kv
    limits = scheduler.limits
    if not scheduler.waiting or len(running) >= min(limits.max_num_seqs, limits.max_num_batched_tokens):
        return False
    r = scheduler.waiting[0]
    match = kv.match(r)
    if kv.fits(r, match, reserve=len(running)):
        return True
    # Free blocks only become fewer, so it fits later only if it finds more in use than now: if a running request
    # computes just the block that comes next in its own text.
    place = len(match.blocks)
    if not kv.prefix_caching or place >= (len(r.tokens) - 1) // kv.block_size:
        return False
    return any(q.num_published <= place and _begin_alike(q, r, place) for q in running)


def _begin_alike(q: Request, r: Request, num_blocks: int) -> bool:
    """Whether their first blocks are equal, as far as `q` has named them."""
    place = min(num_blocks, len(q.block_keys))
    return q.block_keys[place - 1] == r.block_keys[place - 1] if place else q.salt == r.salt


def _within_memory(scheduler: Scheduler, most: int) -> int:
    """As many of `most` rounds as there are blocks for."""
    free, size = scheduler.kv.pool.num_free, scheduler.kv.block_size
    room = [r.capacity - r.num_computed for r in scheduler.running]  # rounds until each needs a block

    def blocks(rounds: int) -> int:
        return sum((rounds - 1 - first) // size + 1 for first in room if first < rounds)

    low, high = 0, most
    if blocks(most) <= free:
        return most
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if blocks(middle) <= free else (low, middle)
    return low
