"""A real gateway whose replicas are stopped, left out and joined while requests run and wait."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from gateways_for_tests import RunningGateway, gateway_before, scripted_replica, text_of, until

from powerband.mock_server.behavior import Behavior, words


@dataclass
class Answer:
    seconds: float
    text: str
    is_whole: bool


async def ask(url: str, max_tokens: int = 40) -> Answer:
    """A streamed completion, over a connection of its own."""
    host, _, port = url.removeprefix("http://").partition(":")
    body = msgspec.json.encode({"model": "scripted", "prompt": "one two", "max_tokens": max_tokens, "stream": True})
    start_s = time.monotonic()
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n")
        writer.write(b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        data = await reader.read()
    finally:
        writer.close()
    lines = [line[6:].rstrip(b"\r") for line in data.split(b"\n") if line.startswith(b"data: ")]
    events: list[Any] = [msgspec.json.decode(line) for line in lines if line != b"[DONE]"]
    return Answer(time.monotonic() - start_s, text_of(events), bool(lines) and lines[-1] == b"[DONE]")


def pool_of(gateway: RunningGateway) -> dict[str, Any]:
    [pool] = gateway.admin.get("/admin/routes").json()["pools"]
    found: dict[str, Any] = pool
    return found


def put_routes(gateway: RunningGateway, *urls: str, max_num_seqs: int) -> None:
    replicas = [
        {"id": f"at {url}", "url": url, "model": "scripted", "engine": "vllm", "max_num_seqs": max_num_seqs}
        for url in urls
    ]
    routes = {"revision": str(time.monotonic()), "models": [{"name": "scripted", "replicas": replicas}]}
    answer = gateway.admin.put("/admin/routes", json=routes)
    assert answer.status_code == 200, answer.text


def test_no_request_is_lost_with_a_replica_that_is_stopped(tmp_path: Path) -> None:
    """Streams that run there go on elsewhere; so do requests that it took and never began to answer."""
    script = Behavior(tpot_s=0.05)
    with gateway_before(tmp_path, script, script) as gateway:

        async def scene() -> tuple[list[Answer], float]:
            tasks = [asyncio.create_task(ask(gateway.url)) for _ in range(12)]
            await asyncio.to_thread(until, gateway.replicas[0].truths)
            os.kill(gateway.replicas[0].process.pid, signal.SIGSTOP)
            tasks += [asyncio.create_task(ask(gateway.url)) for _ in range(12)]
            away_s = await asyncio.to_thread(until, lambda: "ejected" in gateway.replica_states().values(), 30.0)
            return await asyncio.gather(*tasks), away_s

        try:
            answers, away_s = asyncio.run(scene())
        finally:
            os.kill(gateway.replicas[0].process.pid, signal.SIGCONT)
        assert away_s < 15.0  # not the minute that a request may take
        assert all(answer.is_whole and answer.text == words(0, 40) for answer in answers)
        assert max(answer.seconds for answer in answers) < 30.0
        until(lambda: set(gateway.replica_states().values()) == {"ready"})
        assert sum(one["inflight"] for one in pool_of(gateway)["replicas"]) == 0


def test_replicas_come_and_go_while_requests_run_and_wait(tmp_path: Path) -> None:
    """One replica for two at once; ten ask; another one joins and the first is left out: all get their answers."""
    slow = Behavior(tpot_s=0.04)
    with gateway_before(tmp_path, slow) as gateway, scripted_replica(slow) as other:
        first = gateway.replicas[0].url
        put_routes(gateway, first, max_num_seqs=2)
        until(lambda: set(gateway.replica_states().values()) == {"ready"})

        async def scene() -> list[Answer]:
            tasks = [asyncio.create_task(ask(gateway.url)) for _ in range(20)]
            await asyncio.to_thread(until, lambda: pool_of(gateway)["queued"] == 16)
            await asyncio.to_thread(put_routes, gateway, first, other.url, max_num_seqs=2)
            await asyncio.to_thread(until, other.truths)
            await asyncio.to_thread(put_routes, gateway, other.url, max_num_seqs=20)
            return await asyncio.gather(*tasks)

        answers = asyncio.run(scene())
        assert all(answer.is_whole and answer.text == words(0, 40) for answer in answers)
        served = {replica["id"]: replica["inflight"] for replica in pool_of(gateway)["replicas"]}
        assert served == {f"at {other.url}": 0}


def test_clients_that_leave_while_they_wait_leave_nothing_behind(tmp_path: Path) -> None:
    with gateway_before(tmp_path, Behavior(tpot_s=0.02)) as gateway:
        put_routes(gateway, gateway.replicas[0].url, max_num_seqs=1)
        until(lambda: set(gateway.replica_states().values()) == {"ready"})

        async def scene() -> list[Answer]:
            staying = [asyncio.create_task(ask(gateway.url)) for _ in range(4)]
            leaving = [asyncio.create_task(ask(gateway.url)) for _ in range(200)]
            await asyncio.to_thread(until, lambda: pool_of(gateway)["queued"] > 190)
            for task in leaving:
                task.cancel()
            return await asyncio.gather(*staying)

        answers = asyncio.run(scene())
        assert all(answer.is_whole for answer in answers)
        until(lambda: not pool_of(gateway)["queued"] and not pool_of(gateway)["replicas"][0]["inflight"])
        assert asyncio.run(ask(gateway.url)).is_whole
