"""Three times more than replicas can serve: goodput stays, refusals are fast, and it is over soon after."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from gateways_for_tests import gateway_before
from pool_world import make_pool, make_ready, replica, request

from powerband.dispatch.errors import PoolError
from powerband.gateway.dispatch.pool import Pool
from powerband.gateway.routes import ModelRoute
from powerband.mock_server.behavior import Behavior
from powerband.spec.slo import SLO
from virtual_loop import VirtualLoop, virtually

SLO_TTFT_S = 1.0
SERVICE_S = 0.5  # of a request with a replica; its first token comes after 0.1 s
PLACES = 4


@dataclass
class Told:
    sent_s: float
    answered_s: float
    ttft_s: float | None  # None: refused


async def ask(pool: Pool, loop: VirtualLoop, number: int, told: list[Told]) -> None:
    start_s = loop.time()
    try:
        lease = await pool.lease(request(str(number), tenant=f"t{number % 3}", arrival_s=start_s))
    except PoolError:
        told.append(Told(start_s, loop.time(), None))
        return
    await asyncio.sleep(0.1)
    lease.first_token()
    told.append(Told(start_s, loop.time(), loop.time() - start_s))
    await asyncio.sleep(SERVICE_S - 0.1)
    lease.close("ok", output_tokens=10)


@pytest.mark.parametrize("how", ["default deadline", "slo", "slo and rate"])
def test_goodput_does_not_collapse(how: str) -> None:
    """In virtual time: one replica serves eight a second; 7, then 24, then 7 a second come."""

    async def test(loop: VirtualLoop) -> None:
        options = {"default_deadline_s": SLO_TTFT_S} if how == "default deadline" else {}
        pool = make_pool(loop, max_waiting_per_replica=0, **options)
        slo = SLO(ttft_s=SLO_TTFT_S) if how != "default deadline" else None
        rate = PLACES / SERVICE_S if how == "slo and rate" else None
        pool.update(ModelRoute(name="m", replicas=(replica("a", PLACES),), slo=slo, rate=rate))
        make_ready(pool)
        told: list[Told] = []
        tasks = []
        start_s = loop.time()
        for phase_s, rate_per_s in ((20, 7), (60, 24), (20, 7)):
            for i in range(phase_s * rate_per_s):
                tasks.append(asyncio.ensure_future(ask(pool, loop, i, told)))
                await asyncio.sleep(1 / rate_per_s)
        await asyncio.gather(*tasks)

        def goodput(begin_s: float, end_s: float) -> float:
            of_phase = [one for one in told if begin_s <= one.answered_s - start_s < end_s]
            return sum(one.ttft_s is not None and one.ttft_s <= SLO_TTFT_S for one in of_phase) / (end_s - begin_s)

        capacity = PLACES / SERVICE_S
        assert goodput(0, 20) >= 6.9
        assert goodput(20, 80) >= 0.9 * capacity
        onset_s = 0 if how == "default deadline" else 5  # until an overload is one, nobody is refused for the SLO
        refused = [one for one in told if one.ttft_s is None and one.sent_s - start_s > 20 + onset_s]
        at_once = [one for one in refused if one.answered_s - one.sent_s < 0.1]
        assert len(at_once) >= 0.95 * len(refused)
        assert all(one.sent_s - start_s < 85 for one in refused), "five seconds later all is well"
        late = [one for one in told if one.sent_s - start_s > 85 and (one.ttft_s or 9.0) > 0.2]
        assert not late

    virtually(test)


def test_nobody_is_refused_while_a_replica_is_replaced() -> None:
    async def test(loop: VirtualLoop) -> None:
        pool = make_pool(loop)
        addresses = (replica("a", PLACES), replica("b", PLACES))
        pool.update(ModelRoute(name="m", replicas=addresses, slo=SLO(ttft_s=0.5)))
        make_ready(pool)
        told: list[Told] = []
        tasks = []
        for i in range(600):
            tasks.append(asyncio.ensure_future(ask(pool, loop, i, told)))
            await asyncio.sleep(1 / 12)
            if i == 200:
                for backend in pool.backends:
                    backend.probe_failed(loop.time(), "http_503")
                    backend.probe_failed(loop.time(), "http_503")
                    pool.changed(backend)
            if i == 248:  # four seconds
                make_ready(pool)
                make_ready(pool)
        await asyncio.gather(*tasks)
        assert not [one for one in told if one.ttft_s is None]

    virtually(test)


def test_who_comes_back_when_told_is_served() -> None:
    """A burst of ten times what the queue holds, of clients that obey Retry-After: few tries each, and no dead time."""

    async def test(loop: VirtualLoop) -> None:
        pool = make_pool(loop, replica("a", PLACES), max_waiting_per_replica=0, max_queued_requests=20)
        tries: list[int] = []

        async def obey(number: int) -> None:
            for attempt in range(1, 50):
                try:
                    lease = await pool.lease(request(str(number)))
                except PoolError as refusal:
                    await asyncio.sleep(refusal.retry_after_s or 0.0)
                    continue
                await asyncio.sleep(SERVICE_S)
                lease.close("ok", output_tokens=10)
                return tries.append(attempt)
            raise AssertionError("never served")

        await asyncio.gather(*(obey(number) for number in range(20)))  # so that the pool knows how fast it is
        tries.clear()
        start_s = loop.time()
        await asyncio.gather(*(obey(number) for number in range(200)))
        took_s = loop.time() - start_s
        assert took_s < 1.5 * 200 / (PLACES / SERVICE_S)
        assert sorted(tries)[int(0.9 * len(tries))] <= 3

    virtually(test)


# The same through a real gateway: two replicas of eight slots, half a second each: 32 a second. 96 come.

SLOTS = 8
OVERLOAD_S = 5.0
ROUTES = """
revision: "1"
models:
  - name: scripted
    rate: 32
    replicas:
      - {{id: a, url: "{0}", model: scripted, engine: vllm, max_num_seqs: 8}}
      - {{id: b, url: "{1}", model: scripted, engine: vllm, max_num_seqs: 8}}
"""
MOST_LAG_S = 0.2
SCRIPT = Behavior(ttft_s=0.05, tpot_s=0.05, slots=SLOTS)
BODY = b'{"model": "scripted", "prompt": "hello", "max_tokens": 10, "stream": true}'
HEAD = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n" % len(BODY)
)


async def send(host: str, port: int, told: list[Told], problems: list[str]) -> None:
    """By hand: a client library that takes milliseconds for each request would be the bottleneck."""
    start_s = time.monotonic()
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(HEAD + BODY)
        head = await reader.readuntil(b"\r\n\r\n")
        status, first_s = int(head.split()[1]), time.monotonic()
        if status == 200:
            await reader.readuntil(b"data: ")
            first_s = time.monotonic()
        rest = await reader.read()
    finally:
        writer.close()
    if status == 503:
        is_told_why = b"deadline_infeasible" in rest or b"queue_timeout" in rest
        if not is_told_why or b"retry-after" not in head.lower():
            problems.append(f"{head!r} {rest!r}")
    elif status != 200 or b"data: [DONE]" not in rest:
        problems.append(f"{head!r} {rest!r}")
    told.append(Told(start_s, first_s, first_s - start_s if status == 200 else None))


async def drive(url: str, phases: list[tuple[float, float]]) -> tuple[list[Told], list[str]]:
    host, _, port = url.removeprefix("http://").partition(":")
    told: list[Told] = []
    problems: list[str] = []
    tasks, at_s = [], time.monotonic()
    for phase_s, rate in phases:
        for _ in range(int(phase_s * rate)):
            await asyncio.sleep(max(at_s - time.monotonic(), 0))
            if time.monotonic() > at_s + MOST_LAG_S:
                pytest.skip("this machine is too busy to send requests on time")
            tasks.append(asyncio.create_task(send(host, int(port), told, problems)))
            at_s += 1 / rate
    await asyncio.gather(*tasks)
    return told, problems


def test_goodput_does_not_collapse_behind_a_real_gateway(tmp_path: Path) -> None:
    capacity = 2 * SLOTS / 0.5
    begin_s, end_s = 1.0, 1.0 + OVERLOAD_S
    phases = [(begin_s, 0.8 * capacity), (OVERLOAD_S, 3 * capacity), (5.5, 0.8 * capacity)]
    flags = [f"--default-deadline-s={SLO_TTFT_S}"]
    with gateway_before(tmp_path, SCRIPT, SCRIPT, routes=ROUTES, arguments=flags) as gateway:
        start_s = time.monotonic()
        told, problems = asyncio.run(drive(gateway.url, phases))
    assert not problems, problems[:3]
    seen_s = begin_s + 1.0
    in_time = [one for one in told if one.ttft_s is not None and one.ttft_s <= SLO_TTFT_S]
    goodput = sum(seen_s <= one.answered_s - start_s < end_s for one in in_time) / (end_s - seen_s)
    assert goodput >= 0.7 * capacity  # of a queue that collapses it would be next to nothing
    refused = sorted(
        one.answered_s - one.sent_s for one in told if one.ttft_s is None and one.sent_s > start_s + seen_s
    )
    assert len(refused) > capacity
    assert refused[int(0.95 * len(refused))] < SLO_TTFT_S
    after = [one for one in told if one.sent_s - start_s > end_s + 5]
    assert after
    assert all(one.ttft_s is not None and one.ttft_s < 0.5 for one in after), "five seconds later all is well"
