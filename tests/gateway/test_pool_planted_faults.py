"""Random play finds what is wrong with a pool: plant faults, one at a time, and see that it does."""

from __future__ import annotations

import heapq
from dataclasses import replace
from typing import Any

import pytest
from pool_play import play

from planted_faults import Fault, Faults, assert_caught, changed, does_nothing
from powerband.dispatch.admission import AdmissionControl
from powerband.dispatch.backend import Backend
from powerband.dispatch.dispatcher import Dispatcher
from powerband.dispatch.length_pools import arrange, pool_for
from powerband.dispatch.queue import FairQueue, _PriorityClass
from powerband.dispatch.rejection import RejectionBackoff
from powerband.dispatch.routing import without
from powerband.gateway.dispatch.pool import Pool

FAULTS = Faults()
UNLIMITED = 10**9


def play_often() -> None:
    for seed in range(100, 112):
        play(seed)


# One replica: its places and its health


@FAULTS.add("a replica that keeps failing is back as fast as one that failed once", Backend.probe_failed)
def _(right: Any, backend: Any, *arguments: Any) -> Any:
    ejected = right(backend, *arguments)
    backend.ejected_until_s = 0.0
    return ejected


@FAULTS.add("one place too many", Backend.has_capacity)
def _(right: Any, backend: Any, now_s: float) -> Any:
    with changed(backend, limit=backend.limit + 1):
        return right(backend, now_s)


@FAULTS.add("a replica that refused one gets the tenant's next at once", RejectionBackoff.allows_tenant)
def _(_right: Any, _backoff: Any, _tenant: Any, _now_s: float) -> Any:
    return True


@FAULTS.add("draining replicas get more", Backend.is_serving)
def _(_right: Any, backend: Any) -> Any:
    return backend.is_ready and not backend.is_removed


@FAULTS.add("one bad probe is enough", Backend.probe_failed)
def _(right: Any, backend: Any, *arguments: Any) -> Any:
    with changed(backend, options=replace(backend.options, unhealthy_threshold=1)):
        return right(backend, *arguments)


@FAULTS.add("one good probe is enough", Backend.probe_succeeded)
def _(right: Any, backend: Any, *arguments: Any, **more: Any) -> Any:
    with changed(backend, options=replace(backend.options, healthy_threshold=1)):
        return right(backend, *arguments, **more)


@FAULTS.add("good probes need not follow each other", Backend.probe_failed)
def _(right: Any, backend: Any, *arguments: Any) -> Any:
    good = backend._num_good
    ejected = right(backend, *arguments)
    backend._num_good = good
    return ejected


# Who gets a place


@FAULTS.add("a new replica takes nothing from the queue", Dispatcher._rearrange)
def _(right: Any, dispatcher: Any, now_s: float) -> None:
    with changed(dispatcher, _dispatch=does_nothing):
        right(dispatcher, now_s)


@FAULTS.add("a free place is not given away", Dispatcher.release)
def _(right: Any, dispatcher: Any, *arguments: Any, **more: Any) -> None:
    with changed(dispatcher, _dispatch=does_nothing):
        right(dispatcher, *arguments, **more)


FAULTS.add("a cancelled request stays", Dispatcher.cancel)(does_nothing)


@FAULTS.add("a request that is cancelled as it gets a place keeps it", Pool._abandon)
def _(right: Any, pool: Any, queued: Any, future: Any) -> None:
    if queued in pool._futures:
        right(pool, queued, future)


@FAULTS.add("a place for a request that is gone", Dispatcher.release)
def _(right: Any, dispatcher: Any, sent: Any, outcome: str, *arguments: Any, **more: Any) -> None:
    if outcome != "unsent":
        right(dispatcher, sent, outcome, *arguments, **more)


FAULTS.add("expired requests stay", Dispatcher._expire)(does_nothing)
FAULTS.add("no timer is set for requests that wait", Dispatcher.next_deadline)(does_nothing)


@FAULTS.add("closing twice frees twice", Dispatcher.release)
def _(right: Any, dispatcher: Any, sent: Any, *arguments: Any, **more: Any) -> None:
    right(dispatcher, sent, *arguments, **more)
    sent.is_released = False


@FAULTS.add("prompts count until the end", Dispatcher.first_token)
def _(right: Any, dispatcher: Any, sent: Any, *arguments: Any) -> None:
    outstanding = sent.backend.outstanding
    right(dispatcher, sent, *arguments)
    sent.backend.outstanding = outstanding


@FAULTS.add("a request that ends takes its prompt off a second time", Dispatcher.release)
def _(right: Any, dispatcher: Any, sent: Any, *arguments: Any, **more: Any) -> None:
    with changed(sent, outstanding=sent.tokens):
        right(dispatcher, sent, *arguments, **more)


# Second attempts


@FAULTS.add("second attempts go to the same replica", without)
def _(_right: Any, _avoid: Any, free: Any, _serving: Any) -> Any:
    return free


@FAULTS.add("second attempts are refused", Dispatcher._enqueue)
def _(right: Any, dispatcher: Any, request: Any, pool: Any, level: Any, avoid: Any, now_s: float) -> Any:
    pool.admission.admit(request, level, pool.queue, now_s, (dispatcher.queued, dispatcher.queued_tokens))
    return right(dispatcher, request, pool, level, avoid, now_s)


# Replicas for short prompts


@FAULTS.add("long prompts go anywhere", pool_for)
def _(_right: Any, _request: Any, pools: Any) -> Any:
    return pools[0]


@FAULTS.add("short prompts wait for replicas of their own", arrange)
def _(right: Any, *arguments: Any) -> Any:
    pools = right(*arguments)
    for pool in pools:
        if any((one.spec.max_prompt_tokens or float("inf")) != pool.max_prompt_tokens for one in pool.serving):
            pool.serving = []
    return pools


@FAULTS.add("waiting requests are lost when pools change", arrange)
def _(right: Any, *arguments: Any) -> Any:
    with changed(FairQueue, push=does_nothing):
        return right(*arguments)


# The order of the queue


@FAULTS.add("last come, first served", Dispatcher._pick)
def _(right: Any, dispatcher: Any, free: Any, serving: Any, now_s: float, requests: Any) -> Any:
    return right(dispatcher, free, serving, now_s, list(requests)[::-1])


@FAULTS.add("priorities are upside down", FairQueue._level)
def _(right: Any, queue: Any, name: Any) -> Any:
    level = right(queue, name)
    queue._order.sort(reverse=True)
    return level


@FAULTS.add("waiting tokens are never taken off", FairQueue._uncount)
def _(right: Any, queue: Any, queued: Any) -> None:
    tokens = queue.tokens
    right(queue, queued)
    queue.tokens = tokens


@FAULTS.add("a tenant that is passed over is lost", _PriorityClass.pop)
def _(right: Any, waiting: Any, choose: Any) -> Any:
    passed = set()

    def chosen(queueds: Any) -> Any:
        found = choose(queueds)
        if found is None:
            passed.add(next(iter(queueds)).request.tenant)
        return found

    found = right(waiting, chosen)
    waiting._tag_heap = [entry for entry in waiting._tag_heap if entry[2] not in passed]
    heapq.heapify(waiting._tag_heap)
    return found


@FAULTS.add("a tenant whose tokens are corrected is lost", _PriorityClass._tag_changed)
def _(right: Any, waiting: Any, name: str, tenant: Any) -> None:
    if name not in waiting.waiting:
        right(waiting, name, tenant)


@FAULTS.add("the queue has no limit", AdmissionControl._check_room)
def _(right: Any, admission: Any, *arguments: Any) -> None:
    with changed(admission, _options=replace(admission._options, max_queued_requests=UNLIMITED)):
        right(admission, *arguments)


@FAULTS.add("deadlines are ignored", AdmissionControl.admit)
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
    assert {name for world in worlds for name in world.refused} >= {"PoolFull", "DeadlineUnreachable", "QueueTimeout"}
