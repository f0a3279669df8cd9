"""Random play finds what is wrong with a pool: plant faults, one at a time, and see that it does."""

from __future__ import annotations

import heapq
from dataclasses import replace
from typing import Any

import pytest
from pool_play import play

from planted_faults import Fault, Faults, assert_caught, changed, does_nothing
from powerband.gateway.dispatch.admission import Admission
from powerband.gateway.dispatch.lanes import arrange, lane_of
from powerband.gateway.dispatch.lease import Lease
from powerband.gateway.dispatch.member import Member
from powerband.gateway.dispatch.pool import Pool, _without
from powerband.gateway.dispatch.queue import FairQueue, _Class

FAULTS = Faults()
UNLIMITED = 10**9


def play_often() -> None:
    for seed in range(100, 112):
        play(seed)


# One replica: its places and its health


@FAULTS.add("a replica that keeps failing is back as fast as one that failed once", Member.probed_badly)
def _(right: Any, member: Any, *arguments: Any) -> Any:
    ejected = right(member, *arguments)
    member._out_until_s = 0.0
    return ejected


@FAULTS.add("one place too many", Member.has_place)
def _(right: Any, member: Any, now_s: float) -> Any:
    with changed(member, limit=member.limit + 1):
        return right(member, now_s)


@FAULTS.add("a replica that refused one gets the next at once", Member.has_place)
def _(right: Any, member: Any, now_s: float) -> Any:
    with changed(member, busy_until_s=0.0):
        return right(member, now_s)


@FAULTS.add("draining replicas get more", Member.takes_new)
def _(_right: Any, member: Any) -> Any:
    return member.is_ready and not member.is_removed


@FAULTS.add("one bad probe is enough", Member.probed_badly)
def _(right: Any, member: Any, *arguments: Any) -> Any:
    with changed(member, options=replace(member.options, fall=1)):
        return right(member, *arguments)


@FAULTS.add("one good probe is enough", Member.probed_well)
def _(right: Any, member: Any, *arguments: Any, **more: Any) -> Any:
    with changed(member, options=replace(member.options, rise=1)):
        return right(member, *arguments, **more)


@FAULTS.add("good probes need not follow each other", Member.probed_badly)
def _(right: Any, member: Any, *arguments: Any) -> Any:
    good = member._good
    ejected = right(member, *arguments)
    member._good = good
    return ejected


# Who gets a place


@FAULTS.add("a new replica takes nothing from the queue", Pool.changed)
def _(right: Any, pool: Any, member: Any) -> None:
    with changed(pool, _dispatch=does_nothing):
        right(pool, member)


@FAULTS.add("a free place is not given away", Pool.release)
def _(right: Any, pool: Any, *arguments: Any) -> None:
    with changed(pool, _dispatch=does_nothing):
        right(pool, *arguments)


@FAULTS.add("a cancelled request stays", Pool._abandon)
def _(right: Any, pool: Any, ticket: Any) -> None:
    if not ticket.is_queued:
        right(pool, ticket)


@FAULTS.add("a request that is cancelled as it gets a place keeps it", Pool._abandon)
def _(right: Any, pool: Any, ticket: Any) -> None:
    if ticket.is_queued:
        right(pool, ticket)


@FAULTS.add("a place for a request that is gone", Pool._serve)
def _(right: Any, pool: Any, ticket: Any, *arguments: Any) -> None:
    if ticket.future.done():
        with changed(ticket, future=ticket.future.get_loop().create_future()):
            right(pool, ticket, *arguments)
    else:
        right(pool, ticket, *arguments)


FAULTS.add("expired requests stay", Pool._expire)(does_nothing)


@FAULTS.add("closing twice frees twice", Lease.close)
def _(right: Any, lease: Any, *arguments: Any, **more: Any) -> None:
    right(lease, *arguments, **more)
    lease._is_closed = False


@FAULTS.add("prompts count until the end", Pool.first_token_came)
def _(right: Any, pool: Any, lease: Any, ttft_s: float) -> None:
    outstanding = lease.member.outstanding
    right(pool, lease, ttft_s)
    lease.member.outstanding = outstanding


@FAULTS.add("a request that ends takes its prompt off a second time", Pool.release)
def _(right: Any, pool: Any, lease: Any, *arguments: Any) -> None:
    with changed(lease.stay, tokens=lease.tokens):
        right(pool, lease, *arguments)


# Second attempts


@FAULTS.add("second attempts go to the same replica", _without)
def _(_right: Any, _avoid: Any, free: Any, _serving: Any) -> Any:
    return free


@FAULTS.add("second attempts are refused", Pool._queue)
def _(right: Any, pool: Any, request: Any, lane: Any, level: Any, avoid: Any, now_s: float) -> Any:
    lane.admission.admit(request, level, lane.queue, now_s, (pool.queued, pool.queued_tokens))
    return right(pool, request, lane, level, avoid, now_s)


# Replicas for short prompts


@FAULTS.add("long prompts go anywhere", lane_of)
def _(_right: Any, _request: Any, lanes: Any) -> Any:
    return lanes[0]


@FAULTS.add("short prompts wait for replicas of their own", arrange)
def _(right: Any, *arguments: Any) -> Any:
    lanes = right(*arguments)
    for lane in lanes:
        if any((member.address.longest_prompt or float("inf")) != lane.longest_prompt for member in lane.serving):
            lane.serving = []
    return lanes


@FAULTS.add("waiting requests are lost when pools change", arrange)
def _(right: Any, *arguments: Any) -> Any:
    with changed(FairQueue, push=does_nothing):
        return right(*arguments)


# The order of the queue


@FAULTS.add("last come, first served", Pool._pick)
def _(right: Any, pool: Any, free: Any, serving: Any, tickets: Any) -> Any:
    return right(pool, free, serving, list(tickets)[::-1])


@FAULTS.add("priorities are upside down", FairQueue._level)
def _(right: Any, queue: Any, name: Any) -> Any:
    level = right(queue, name)
    queue._order.sort(reverse=True)
    return level


@FAULTS.add("waiting tokens are never taken off", FairQueue._left)
def _(right: Any, queue: Any, ticket: Any) -> None:
    tokens = queue.tokens
    right(queue, ticket)
    queue.tokens = tokens


@FAULTS.add("a tenant that is passed over is lost", _Class.pop)
def _(right: Any, waiting: Any, choose: Any) -> Any:
    passed = set()

    def chosen(tickets: Any) -> Any:
        found = choose(tickets)
        if found is None:
            passed.add(next(iter(tickets)).request.tenant)
        return found

    found = right(waiting, chosen)
    waiting._heap = [entry for entry in waiting._heap if entry[2] not in passed]
    heapq.heapify(waiting._heap)
    return found


@FAULTS.add("a tenant whose tokens are corrected is lost", _Class._changed)
def _(right: Any, waiting: Any, tenant: str) -> None:
    if tenant not in waiting.flows:
        right(waiting, tenant)


@FAULTS.add("the queue has no limit", Admission._check_room)
def _(right: Any, admission: Any, *arguments: Any) -> None:
    with changed(admission, _options=replace(admission._options, max_queued_requests=UNLIMITED)):
        right(admission, *arguments)


@FAULTS.add("deadlines are ignored", Admission.admit)
def _(right: Any, admission: Any, *arguments: Any) -> Any:
    with changed(admission, _deadline_s=does_nothing):
        return right(admission, *arguments)


def test_play_passes_without_a_fault() -> None:
    play_often()


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_play_catches(fault: Fault) -> None:
    assert_caught(fault, play_often)


@pytest.mark.parametrize("routing", ["least-outstanding", "prefix", "session", "weighted"])
def test_a_pool_does_what_a_plain_model_says(routing: str) -> None:
    worlds = [play(seed, routing=routing) for seed in range(100, 105)]
    assert sum(world.grants for world in worlds) > 200
    assert {name for world in worlds for name in world.refused} >= {"PoolFull", "DeadlineInfeasible", "Expired"}
