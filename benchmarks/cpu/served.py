"""Row h: each engine behind its own HTTP server, the same requests to /v1/completions, streamed."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from typing import IO, Any

from benchmarks.cpu import rows
from benchmarks.cpu.quiet import Guard

START_S = 400.0  # vLLM compiles for minutes the first time
ROUNDS = 2  # of all requests at once, at each concurrency


def run(job: dict[str, Any]) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    guard = Guard(job["guard"])
    command, environment = _server(job, port)
    log = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the process)
    server = subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=log)
    guard.children.append(server.pid)
    try:
        _wait_for(port, server, log)
        load = Load(port, job)
        load.measure(1, 8)  # warm
        load.measure(32, 2)
        found: dict[str, float] = {}
        for count in rows.CONCURRENCIES:
            found |= guard(f"h {count}", lambda count=count: load.row(count))  # type: ignore[misc]  # bound now
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
    return {"metrics": found, "others": guard.others, "versions": {}}


def _server(job: dict[str, Any], port: int) -> tuple[list[str], dict[str, str]]:
    """The server's command and environment."""
    threads, length = str(job["threads"]), str(job["max_len"])
    match job["kind"]:
        case "powerband":
            options = [f"--{name.replace('_', '-')}={value}" for name, value in job["options"].items()]
            command = [
                sys.executable,
                "-m",
                "powerband",
                "serve",
                job["model"],
                f"--port={port}",
                f"--threads={threads}",
            ]
            command += ["--dtype=bfloat16", "--device=cpu", "--max-num-seqs=32", f"--max-model-len={length}"]
            return [*command, f"--kv-cache-memory={job['kv_bytes']}B", "--no-enable-prefix-caching", *options], {}
        case "vllm":
            command = [job["python"], "-m", "vllm.entrypoints.openai.api_server", "--model", job["model"]]
            command += ["--port", str(port), "--dtype", "bfloat16", "--max-model-len", length, "--max-num-seqs", "32"]
            command += ["--max-num-batched-tokens", "2048", "--no-enable-prefix-caching"]
            command += ["--enforce-eager"] if job["options"].get("enforce_eager") else []
            kv_gib = str(-(-job["kv_bytes"] // 2**30))
            bind = f"0-{job['threads'] - 1}"
            more = {"VLLM_CPU_KVCACHE_SPACE": kv_gib, "VLLM_CPU_OMP_THREADS_BIND": bind, "HF_HUB_OFFLINE": "1"}
            return command, more
        case "llama":
            tokens = str(32 * (rows.HTTP_PROMPT + rows.HTTP_OUTPUT + 32))
            command = [f"{job['bin']}/llama-server", "-m", job["model"], "--port", str(port), "-c", tokens]
            command += ["-np", "32", "-t", threads, "-tb", threads, "-fa", "on", "-no-kvu", "--no-cache-prompt"]
            return [*command, "-cram", "0", "--no-ui"], {}
    raise ValueError(f"no server is known for {job['kind']}")


def _wait_for(port: int, server: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            log.seek(0)
            tail = "\n".join(log.read().decode(errors="replace").splitlines()[-8:])
            raise RuntimeError(f"the server ended with {server.returncode}\n{tail}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            pass
        time.sleep(0.25)
    raise RuntimeError(f"the server was not ready after {START_S:.0f} s")


class Load:
    """Requests over plain sockets; prompts are token ids, so that no engine spends time on tokenizing."""

    def __init__(self, port: int, job: dict[str, Any]) -> None:
        self.port, self.job = port, job
        self._random = random.Random(job["seed"])

    def row(self, count: int) -> dict[str, float]:
        taken = [self.measure(count, rows.HTTP_OUTPUT) for _ in range(ROUNDS)]
        return {
            f"h throughput {count}": statistics.median(throughput for throughput, _ in taken),
            f"h ttft {count}": statistics.median(ttft_ms for _, ttft_ms in taken),
        }

    def measure(self, count: int, output: int) -> tuple[float, float]:
        """Output tokens a second and the median TTFT in ms, of `count` requests at once."""

        async def all_of_them() -> list[float]:
            return await asyncio.gather(*(self._request(output) for _ in range(count)))

        start = time.perf_counter()
        firsts = asyncio.run(all_of_them())
        return count * output / (time.perf_counter() - start), 1000 * statistics.median(firsts)

    async def _request(self, output: int) -> float:
        """Send one, read its stream to the end. Returns seconds to the first event. Raises RuntimeError."""
        prompt = [self._random.randrange(300, self.job["vocab"]) for _ in range(rows.HTTP_PROMPT)]
        asked = {"prompt": prompt, "max_tokens": output, "temperature": 0, "ignore_eos": True, "stream": True}
        body = json.dumps(asked | {"model": self.job["model"]}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}"
        start = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(f"{head}\r\nContent-Type: application/json\r\n\r\n".encode() + body)
        first, received = 0.0, b""
        while data := await reader.read(1 << 16):
            received += data
            if not first and b"data: {" in received:
                first = time.perf_counter() - start
        writer.close()
        if b" 200 " not in received[:20] or b"[DONE]" not in received:
            raise RuntimeError(f"the server answered {received[:300]!r}")
        return first
