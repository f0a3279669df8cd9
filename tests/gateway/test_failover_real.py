"""Two replicas with the demo model: one is killed in the middle of answers, and no token is wrong."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import msgspec
from gateways_for_tests import RunningGateway, running_gateway, until

BODY = {"model": "demo", "max_tokens": 120, "ignore_eos": True, "return_token_ids": True, "stream": True}
SAMPLED = {"temperature": 1.0, "top_p": 0.9, "seed": 7, "presence_penalty": 0.5, "frequency_penalty": 0.3}
REQUESTS: dict[str, tuple[str, dict[str, object]]] = {
    "greedy text": ("/v1/completions", {"prompt": "def main():", "temperature": 0}),
    "sampled text": ("/v1/completions", {"prompt": "import os\n", **SAMPLED}),
    "sampled chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "What is a list?"}], **SAMPLED}),
}


@contextlib.contextmanager
def replica(folder: Path, *flags: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`powerband serve demo`, in its own process group. float32: then a prompt read at once rounds as tokens did."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "powerband", "serve", "demo", f"--port={port}", "--threads=1"]
    command += ["--dtype=float32", "--max-model-len=256", "--kv-cache-memory=16MiB", *flags]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("POWERBAND_")}
    with (folder / f"replica-{port}.log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log, stdout=log, start_new_session=True, env=environment)
    try:
        yield f"http://127.0.0.1:{port}", process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def told(gateway: RunningGateway, kind: str, begun: threading.Barrier | None = None) -> tuple[list[int], str, str]:
    """Ids, text and finish reason of a stream. Waits in the middle of it until all others are there, too."""
    path, body = REQUESTS[kind]
    ids: list[int] = []
    text, reason, last = "", "", ""
    with httpx.stream("POST", f"{gateway.url}{path}", json={**BODY, **body}, timeout=60) as answer:
        for number, line in enumerate(line for line in answer.iter_lines() if line):
            if number == 15 and begun is not None:
                begun.wait(30)
            last = line.removeprefix("data: ")
            for choice in msgspec.json.decode(last)["choices"] if last != "[DONE]" else ():
                ids += choice.get("token_ids") or []
                text += choice.get("text") or choice.get("delta", {}).get("content") or ""
                reason = choice["finish_reason"] or reason
    assert last == "[DONE]"
    return ids, text, reason


def test_answers_survive_their_replica(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        replicas = [stack.enter_context(replica(tmp_path)) for _ in range(2)]
        gateway = stack.enter_context(running_gateway(tmp_path, *(f"--replica={url}" for url, _ in replicas)))
        until(lambda: list(gateway.replica_states().values()) == ["ready"] * 2, 60)
        whole = [told(gateway, kind) for kind in REQUESTS]
        begun = threading.Barrier(len(REQUESTS), action=lambda: os.killpg(replicas[0][1].pid, signal.SIGKILL))
        with ThreadPoolExecutor(len(REQUESTS)) as threads:
            cut = list(threads.map(lambda kind: told(gateway, kind, begun), REQUESTS))
        assert [len(ids) for ids, _, _ in whole] == [120] * len(REQUESTS)
        assert cut == whole
        assert sum(one["resumed"] for one in gateway.records()) >= 1
