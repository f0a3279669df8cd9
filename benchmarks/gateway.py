"""What a gateway adds to the time to the first token, and what it bears: ours beside nginx and LiteLLM's proxy.

    python benchmarks/gateway.py [--rates 10 500] [--seconds 6] [--rounds 4] [--skip litellm]

Replicas are two scripted servers: a short chat of 8 tokens, the first after 20 ms, then one every 5 ms. The load is two
processes of `powerband bench`, each at half the rate, arrivals at random, the same for all. One system at a time, in
turns; "direct" is the same load without a proxy between. added: the difference of equal percentiles within a round; the
median over the rounds, of which some are disturbed on a shared machine (all of them stand in the result).
Everything shares this machine's cores, the load and the replicas, too: what is added holds the wait for a core. So the
CPU time that each proxy used is told as well, which does not depend on that.

streams: 2,000 at once, a token every 250 ms on each. most: as many requests as go through, by 64 users, one token each.
nginx is Debian's, a plain proxy with one worker that buffers nothing. LiteLLM's proxy is installed outside the
repository: python -m venv ~/.cache/powerband/bench/venvs/litellm, then pip install "litellm[proxy]". It takes tens
of milliseconds of a core for each request, and is left out at rates that one process of it cannot bear.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import sys
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import msgspec
from gateway_peers import MODEL, Proxy, proxy, versions

from powerband.bench.client.messages import Sample, ServerAddress
from powerband.bench.load import Live, LoadOptions, LoadResult, run_load
from powerband.metrics.record import Outcome
from powerband.mock_server.behavior import Behavior
from powerband.mock_server.process import mock_server_process
from powerband.spec.hardware.device import detect_cpu
from powerband.spec.workload.arrivals import Arrivals, ClosedLoop, OpenLoop
from powerband.spec.workload.lengths import Fixed
from powerband.spec.workload.workload import RequestMix, Workload

RESULTS = Path(__file__).parent / "results" / "gateway.json"
PERCENTILES = (50, 95, 99)
SEED = 1
CLIENTS = 2
SHORT = Behavior(ttft_s=0.020, tpot_s=0.005, model=MODEL)
TOKENS = 8
SLOW = Behavior(ttft_s=0.5, tpot_s=0.25, model=MODEL)
STREAMS, SLOW_TOKENS = 2000, 40
USERS = 64
LITELLM_BEARS = 20.0  # requests a second
LEAST_REQUESTS = 300  # in a round
TARGET_RATE, TARGET_P50_MS, TARGET_P99_MS, TARGET_BYTES = 500.0, 2.0, 10.0, 1 << 30


@dataclass
class Run:
    """One load on one system. cpu_s, memory_bytes (the most): of the proxy."""

    samples: list[Sample]
    seconds: float
    cpu_s: float
    memory_bytes: int
    client_share: float

    @property
    def ttfts_ms(self) -> list[float]:
        """As users count: from the time at which a request was due."""
        good = [one for one in self.samples if one.outcome is Outcome.OK and one.chunk_times_s]
        return sorted(1e3 * (one.chunk_times_s[0] - one.scheduled_s) for one in good)

    @property
    def errors(self) -> int:
        return sum(one.outcome is not Outcome.OK for one in self.samples)

    @property
    def chunks(self) -> int:
        return sum(len(one.chunk_times_s) for one in self.samples)


async def load(
    system: Proxy, replicas: Sequence[str], arrivals: Callable[[int], Arrivals], *, tokens: int, **ends: Any
) -> Run:
    """From both clients at once. arrivals: of a client; ends: as Workload.draw's."""
    most = 0

    def watch(_: Live) -> None:
        nonlocal most
        most = max(most, system.memory_bytes())

    async def client(number: int) -> LoadResult:
        base = replicas[number % len(replicas)] if system.name == "direct" else system.url
        headers = {"Authorization": "Bearer none"}
        target = ServerAddress(base=base, endpoint="chat", model=MODEL, ignore_eos=False, headers=headers)
        workload = Workload(name="gateway", arrivals=arrivals(number), requests=RequestMix(Fixed(12), Fixed(tokens)))
        schedule = workload.draw(SEED + number, **ends)
        return await run_load(
            target, schedule, LoadOptions(metrics_url=None, drain_s=20.0, timeout_s=30.0), watch=watch
        )

    before_s = system.cpu_s()
    results = await asyncio.gather(*(client(number) for number in range(CLIENTS)))
    return Run(
        [sample for result in results for sample in result.samples],
        max(result.wall_s for result in results),
        system.cpu_s() - before_s,
        max(most, system.memory_bytes()),
        max(result.client_share for result in results),
    )


async def with_replicas(script: Behavior, act: Callable[[list[str]], Any]) -> Any:
    async with AsyncExitStack() as stack:
        started = [await stack.enter_async_context(mock_server_process(script)) for _ in range(CLIENTS)]
        return await act([one.target.base for one in started])


async def added(names: Sequence[str], rate: float, seconds: float, rounds: int) -> dict[str, list[Run]]:
    """Rounds of all systems in turns."""
    names = [name for name in names if name != "litellm" or rate <= LITELLM_BEARS]
    seconds = max(seconds, LEAST_REQUESTS / rate)

    async def measure(replicas: list[str]) -> dict[str, list[Run]]:
        found: dict[str, list[Run]] = {name: [] for name in names}
        for round_number in range(rounds):
            for name in names if round_number % 2 == 0 else reversed(names):
                with proxy(name, replicas) as system:
                    await load(system, replicas, lambda _: OpenLoop.at(rate / 4), tokens=TOKENS, duration_s=1.0)  # warm
                    run = await load(
                        system, replicas, lambda _: OpenLoop.at(rate / CLIENTS), tokens=TOKENS, duration_s=seconds
                    )
                found[name].append(run)
                shown = "  ".join(f"p{p} {value:7.2f}" for p, value in percentiles(run.ttfts_ms).items())
                print(f"  {rate:g}/s {name:<8} TTFT {shown} ms, {run.errors} errors", file=sys.stderr)
        return found

    return dict(await with_replicas(SHORT, measure))


async def streams(names: Sequence[str]) -> dict[str, Run]:
    """All at once: the first half second starts them."""

    async def measure(replicas: list[str]) -> dict[str, Run]:
        found = {}
        for name in names:
            with proxy(name, replicas) as system:
                found[name] = await load(
                    system,
                    replicas,
                    lambda _: OpenLoop.at(STREAMS / CLIENTS, float("inf")),
                    tokens=SLOW_TOKENS,
                    num_requests=STREAMS // CLIENTS,
                )
        return found

    return dict(await with_replicas(SLOW, measure))


async def most(names: Sequence[str], seconds: float) -> dict[str, Run]:
    """Users who ask again at once, of replicas that answer at once."""

    async def measure(replicas: list[str]) -> dict[str, Run]:
        found = {}
        for name in names:
            with proxy(name, replicas) as system:
                found[name] = await load(
                    system, replicas, lambda _: ClosedLoop(USERS // CLIENTS), tokens=1, duration_s=seconds
                )
        return found

    return dict(await with_replicas(Behavior(model=MODEL), measure))


def percentiles(values: Sequence[float]) -> dict[int, float]:
    cuts = quantiles(values, n=100, method="inclusive") if len(values) > 1 else [float("nan")] * 99
    return {p: cuts[p - 1] for p in PERCENTILES}


def show_added(rate: float, found: dict[str, list[Run]]) -> list[dict[str, Any]]:
    print(f"\n{rate:g} requests/s, {len(found['direct'])} rounds: TTFT in ms, and what each adds")
    shares = "".join(f"{sign + str(p):>8}" for sign in ("p", "+p") for p in PERCENTILES)
    print(f"{'':<9}{shares}   {'CPU ms/request':>14} {'errors':>7}")
    base = [percentiles(run.ttfts_ms) for run in found["direct"]]
    rows = []
    for name, runs in found.items():
        told = [percentiles(run.ttfts_ms) for run in runs]
        own = {p: median(one[p] for one in told) for p in PERCENTILES}
        more = {p: median(one[p] - bare[p] for one, bare in zip(told, base, strict=True)) for p in PERCENTILES}
        count, errors = sum(len(run.samples) for run in runs), sum(run.errors for run in runs)
        cpu_ms = 1e3 * sum(run.cpu_s for run in runs) / count
        shown = "".join(f"{own[p]:8.2f}" for p in PERCENTILES) + "".join(f"{more[p]:8.2f}" for p in PERCENTILES)
        print(f"{name:<9}{shown}   {cpu_ms:>14.3f} {errors:>7}")
        each = [{str(p): value for p, value in one.items()} for one in told]
        row = {
            "system": name,
            "requests": count,
            "errors": errors,
            "cpu_ms_per_request": cpu_ms,
            "rounds_ttft_ms": each,
        }
        row |= {"rounds_ttft_ms": each}
        row |= {"ttft_ms": {str(p): own[p] for p in PERCENTILES}, "added_ms": {str(p): more[p] for p in PERCENTILES}}
        rows.append(row | {"client_share": max(run.client_share for run in runs)})
    return rows


def show_streams(found: dict[str, Run]) -> list[dict[str, Any]]:
    print(f"\n{STREAMS} streams at once, {SLOW_TOKENS} tokens each, one every {SLOW.tpot_s * 1000:.0f} ms")
    print(f"{'':<9}{'memory MiB':>11} {'CPU us/chunk':>13} {'errors':>7} {'TTFT p99 ms':>12}")
    rows = []
    for name, run in found.items():
        per_chunk = 1e6 * run.cpu_s / max(run.chunks, 1)
        last = percentiles(run.ttfts_ms)[99]
        print(f"{name:<9}{run.memory_bytes / 2**20:>11.0f} {per_chunk:>13.1f} {run.errors:>7} {last:>12.0f}")
        row = {"system": name, "memory_bytes": run.memory_bytes, "cpu_us_per_chunk": per_chunk, "errors": run.errors}
        rows.append(row | {"chunks": run.chunks, "ttft_p99_ms": last, "client_share": run.client_share})
    return rows


def show_most(found: dict[str, Run]) -> list[dict[str, Any]]:
    print(f"\n{USERS} users, one token each: requests/s")
    rows = []
    for name, run in found.items():
        rate = (len(run.samples) - run.errors) / run.seconds
        cpu_ms = 1e3 * run.cpu_s / max(len(run.samples), 1)
        print(f"{name:<9}{rate:>9.0f}  {cpu_ms:.3f} CPU ms/request, {run.errors} errors")
        rows.append({"system": name, "requests_per_s": rate, "cpu_s": run.cpu_s, "errors": run.errors})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[10.0, TARGET_RATE])
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--skip", nargs="*", default=[], choices=["nginx", "litellm"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    peers = [name for name in ("nginx", "litellm") if name not in options.skip]
    known = versions(peers)
    for name in set(peers) - set(known):
        print(f"{name} is not installed here and left out.")
    names = ["direct", "gateway", *known]
    result: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/gateway.py", *sys.argv[1:]]),
        "processor": detect_cpu().name,
        "cores": detect_cpu().cores,
        "python": platform.python_version(),
        "powerband": version("powerband"),
        "versions": known,
        "seed": SEED,
        "added": {},
    }
    for rate in options.rates:
        rows = show_added(rate, asyncio.run(added(names, rate, options.seconds, options.rounds)))
        result["added"][f"{rate:g}"] = rows
    result["streams"] = show_streams(
        asyncio.run(streams([name for name in names if name not in ("direct", "litellm")]))
    )
    result["most"] = show_most(asyncio.run(most(names, options.seconds)))
    options.out.write_text(json.dumps(msgspec.to_builtins(result), indent=2) + "\n")
    return judge(result)


def judge(result: dict[str, Any]) -> int:
    """0 when our targets are kept, of what was measured."""
    kept = True
    ours = [row for row in result["added"].get(f"{TARGET_RATE:g}", []) if row["system"] == "gateway"]
    for row in ours:
        p50, p99 = row["added_ms"]["50"], row["added_ms"]["99"]
        kept = p50 <= TARGET_P50_MS and p99 <= TARGET_P99_MS and not row["errors"]
        print(f"\ntarget: at most {TARGET_P50_MS:g} ms at p50 and {TARGET_P99_MS:g} ms at p99: {p50:.2f} and {p99:.2f}")
    for row in (row for row in result["streams"] if row["system"] == "gateway"):
        kept = kept and row["memory_bytes"] < TARGET_BYTES and not row["errors"]
        print(
            f"target: {STREAMS} streams under 1 GiB without an error: "
            f"{row['memory_bytes'] / 2**20:.0f} MiB, {row['errors']} errors"
        )
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
