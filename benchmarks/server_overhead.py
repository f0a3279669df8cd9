"""What the server adds to the engine: CPU per streamed token, and time to the first one.

    python benchmarks/server_overhead.py

The engine runs in a process of its own as always, with the real scheduler, but its steps only wait for 10 ms. So
all that is measured is ours: HTTP, JSON, tokenizing, the way to the engine and back, detokenizing, the stream. Every
request is a chat that streams 128 tokens to a raw socket. "added" is the time from sending a request to its first text,
less the one step that it takes. The limit this project sets itself is 100 µs of the API process per streamed token.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import powerband
from powerband.core.admission import SchedulerLimits
from powerband.core.clock import Clock
from powerband.core.kv_cache import KVCacheManager
from powerband.core.loop import EngineCore, Inbox
from powerband.core.scheduler import Scheduler
from powerband.core.simulation import SimExecutor
from powerband.core.step import Work
from powerband.engine.client.messages import EngineInfo
from powerband.spec.settings import EngineSettings

LIMIT_US = 100.0
STEP_S = 0.010
TOKENS = 128
ROUNDS = 4  # of all streams at once; more for few streams
DEMO = Path(powerband.__file__).parent / "demo"


@dataclass
class Built:
    core: EngineCore
    info: EngineInfo
    residuals: None = None  # no latency model knows it

    def close(self) -> None:
        """Nothing is open."""


def build(_: EngineSettings, *, inbox: Inbox, clock: Clock, progress: Callable[[str, float], None]) -> Built:
    """An engine that knows nothing but the time: ids 300, 301, … are text of the demo model's tokenizer."""
    progress("nothing", 1.0)
    limits = SchedulerLimits(max_model_len=1024, max_num_seqs=256, max_num_batched_tokens=8192)
    executor = SimExecutor(clock, lambda _: STEP_S, sample=_next_token)
    core = EngineCore(Scheduler(KVCacheManager(4096, 32), limits), executor, clock, inbox)
    info = EngineInfo(
        model_folder=str(DEMO),
        max_model_len=1024,
        vocab_size=4096,
        eos_token_ids=[],
        kv_capacity_tokens=4096 * 32,
        device="none",
        dtype="none",
        summary="An engine that waits",
        config={},
    )
    return Built(core, info)


def _next_token(work: Work) -> list[int]:
    return [300 + (work.start + work.num_tokens) % 1000]


async def one_request(port: int, index: int) -> tuple[float, int]:
    """Seconds to the first text, and events received."""
    message = {"role": "user", "content": f"Request {index}: tell me something about the standard library."}
    body = json.dumps({"messages": [message], "max_tokens": TOKENS, "stream": True}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}"
    sent_s = time.perf_counter()
    writer.write(f"{head}\r\nContent-Type: application/json\r\n\r\n".encode() + body)
    first_s, received = 0.0, b""
    while data := await reader.read(1 << 16):
        received += data
        if not first_s and b'"content":"' in received.replace(b'"content":""', b""):
            first_s = time.perf_counter() - sent_s
    writer.close()
    return first_s, received.count(b"data: {")


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(port: int, api: int, engine: int, concurrency: int) -> dict[str, float]:
    async def load() -> list[tuple[float, int]]:
        return await asyncio.gather(*(one_request(port, i) for i in range(concurrency)))

    asyncio.run(load())  # warm
    before = cpu_s(api), cpu_s(engine)
    results = [result for _ in range(ROUNDS * max(1, 4 // concurrency)) for result in asyncio.run(load())]
    tokens = TOKENS * len(results)
    added = sorted(1000 * (first_s - STEP_S) for first_s, _ in results)
    return {
        "concurrency": concurrency,
        "api_cpu_us_per_token": 1e6 * (cpu_s(api) - before[0]) / tokens,
        "engine_cpu_us_per_token": 1e6 * (cpu_s(engine) - before[1]) / tokens,
        "events_per_token": sum(events for _, events in results) / tokens,
        "added_ttft_ms_p50": statistics.median(added),
        "added_ttft_ms_p95": added[int(0.95 * (len(added) - 1))],
    }


def main() -> int:
    if "--engine" in sys.argv:
        from powerband.engine.process import main as serve_engine

        return serve_engine(build)
    if "--serve" in sys.argv:
        from powerband.engine.client.supervisor import EngineProcess
        from powerband.server.run import serve
        from powerband.server.settings import ServerSettings

        command = (sys.executable, __file__, "--engine")
        return serve(EngineSettings(), ServerSettings(port=int(sys.argv[-1])), partial(EngineProcess, command=command))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen([sys.executable, __file__, "--serve", str(port)], stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        while not server.stderr.readline().startswith("URL"):
            assert server.poll() is None
        engine = int(Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()[0])
        rows = [measure(port, server.pid, engine, concurrency) for concurrency in (1, 16, 64)]
    finally:
        server.terminate()
        server.wait()
    show = "{concurrency:>4} {api_cpu_us_per_token:>12.1f} {engine_cpu_us_per_token:>12.1f}"
    show += " {added_ttft_ms_p50:>14.2f} {added_ttft_ms_p95:>14.2f}"
    print("conc   API µs/token  engine µs/tok  added ms p50   added ms p95")
    for row in rows:
        print(show.format(**row))
    busiest = rows[-1]["api_cpu_us_per_token"]
    print(f"limit: {LIMIT_US:.0f} µs per token at 64 streams; {'kept' if busiest <= LIMIT_US else 'not kept'}")
    result = {"python": platform.python_version(), "machine": platform.machine(), "cpus": os.cpu_count(), "rows": rows}
    (Path(__file__).parent / "results").mkdir(exist_ok=True)
    (Path(__file__).parent / "results" / "server_overhead.json").write_text(json.dumps(result, indent=2) + "\n")
    return 0 if busiest <= LIMIT_US else 1


if __name__ == "__main__":
    sys.exit(main())
