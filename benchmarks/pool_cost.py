"""What the gateway's pool itself costs: CPU microseconds for a place with a replica, and for giving it back.

    python benchmarks/pool_cost.py

400 requests are under way on 4 or 16 replicas, of 10 tenants with 50 prefixes of 16 blocks; in the last rows 3000 more
wait, so that each place that is given back goes to the next one. The limit this project sets itself is 50 µs each:
5 % of a core at 500 requests a second. Medians are over repetitions.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import platform
import statistics
import time
from pathlib import Path

from powerband.dispatch.options import ROUTINGS, Routing
from powerband.gateway.dispatch.pool import Lease, Pool
from powerband.gateway.options import PoolOptions
from powerband.gateway.request import GatewayRequest
from powerband.gateway.routes import ModelRoute, ReplicaAddress

LIMIT_US = 50.0
UNDER_WAY = 400
REQUESTS = 4000
Costs = tuple[float, float]  # of a lease, and of its end


def make_pool(routing: Routing, num_replicas: int, max_num_seqs: int) -> Pool:
    pool = Pool(PoolOptions(routing=routing, max_queued_requests=REQUESTS))
    addresses = (
        ReplicaAddress(id=f"r{i}", url="http://localhost:1", model="m", max_num_seqs=max_num_seqs)
        for i in range(num_replicas)
    )
    pool.update(ModelRoute(name="m", replicas=tuple(addresses)))
    for backend in pool.backends:
        backend.probe_succeeded(time.monotonic())
        pool.changed(backend)
    return pool


def request(i: int) -> GatewayRequest:
    keys = tuple(b"%d %d" % (i % 50, block) for block in range(16))
    sizes = {"prompt_tokens": 100, "output_tokens": 100}
    return GatewayRequest(
        id=f"{i}", endpoint="chat", model="m", tenant=f"t{i % 10}", session=f"{i % 50}", prefix_keys=keys, **sizes
    )


def end(lease: Lease) -> None:
    lease.first_token(100)
    lease.close("ok", output_tokens=50)


async def measure(routing: Routing, num_replicas: int) -> Costs:
    """Places are free."""
    pool, requests = make_pool(routing, num_replicas, UNDER_WAY), [request(i) for i in range(REQUESTS)]
    live = [await pool.lease(one) for one in requests[:UNDER_WAY]]
    gc.collect()
    spent = [0.0, 0.0]
    for one in requests[UNDER_WAY:]:
        start = time.process_time()
        live.append(await pool.lease(one))
        middle = time.process_time()
        end(live.pop(0))
        spent[0] += middle - start
        spent[1] += time.process_time() - middle
    return _us(spent[0]), _us(spent[1])


async def measure_full(routing: Routing, num_replicas: int) -> Costs:
    """Every place is taken, and each that becomes free goes to who waits. The first cost is of joining the queue."""
    pool = make_pool(routing, num_replicas, UNDER_WAY // num_replicas)
    places = sum(backend.max_in_flight for backend in pool.backends)
    live = [await pool.lease(request(i)) for i in range(places)]
    gc.collect()
    start = time.process_time()
    waiting = [asyncio.ensure_future(pool.lease(request(i))) for i in range(REQUESTS - UNDER_WAY)]
    await asyncio.sleep(0)
    joined = time.process_time() - start
    ended = 0.0
    while pool.dispatcher.queued:
        start = time.process_time()
        for lease in live:
            end(lease)
        ended += time.process_time() - start
        await asyncio.sleep(0)
        live = [task.result() for task in waiting if task.done()]
        waiting = [task for task in waiting if not task.done()]
    return _us(joined), _us(ended)


def _us(seconds: float) -> float:
    return seconds / (REQUESTS - UNDER_WAY) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "pool_cost.json")
    arguments = parser.parse_args()
    rows = []
    print("replicas  routing            waiting   µs: lease (or queue)   end   limit")
    for waiting, function in ((0, measure), (REQUESTS - UNDER_WAY, measure_full)):
        for num_replicas in (4, 16):
            for routing in ROUTINGS:
                costs = [asyncio.run(function(routing, num_replicas)) for _ in range(arguments.repetitions)]
                lease_us, end_us = (statistics.median(cost[i] for cost in costs) for i in (0, 1))
                rows.append({"replicas": num_replicas, "routing": routing, "waiting": waiting, "us": costs})
                shown = f"{lease_us:20.1f} {end_us:7.1f} {LIMIT_US:7.0f}"
                print(f"{num_replicas:8d}  {routing:17s} {waiting:8d} {shown}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "benchmark": "pool_cost",
        "seed": None,  # nothing is random
        "machine": {"processor": _processor(), "system": platform.platform()},
        "versions": {"python": platform.python_version()},
        "limit_us": LIMIT_US,
        "rows": rows,
    }
    arguments.output.write_text(json.dumps(report, indent=2) + "\n")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
