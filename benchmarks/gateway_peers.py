"""The proxies that benchmarks/gateway.py compares: how each is started before scripted replicas, and what it takes."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import yaml

from powerband.folders import cache_directory
from powerband.gateway.routes import ModelRoute, ReplicaAddress, Routes

MODEL = "scripted"
LITELLM = cache_directory() / "bench" / "venvs" / "litellm" / "bin"
_START_S = 90.0


@dataclass
class Proxy:
    """A proxy that runs. pids: of all of its processes."""

    name: str
    url: str
    process: subprocess.Popen[bytes] | None = None

    @property
    def pids(self) -> list[int]:
        return [] if self.process is None else _family(self.process.pid)

    def cpu_s(self) -> float:
        """Of all processes, so far."""
        ticks = 0
        for pid in self.pids:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def memory_bytes(self) -> int:
        """Resident, of all processes."""
        pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self.pids)
        return pages * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def proxy(name: str, replicas: Sequence[str]) -> Iterator[Proxy]:
    """Ends with the block. Raises RuntimeError when it does not start."""
    if name == "direct":
        yield Proxy(name, replicas[0])
        return
    with tempfile.TemporaryDirectory(prefix=f"powerband-{name}-") as folder:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = _COMMANDS[name](Path(folder), port, replicas)
        log = Path(folder) / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True, env=_environment()
            )
        found = Proxy(name, f"http://127.0.0.1:{port}", process)
        try:
            _wait_for(found, log)
            yield found
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def versions(names: Sequence[str]) -> dict[str, str]:
    """Of those that are installed; others are left out."""
    found = {}
    if "nginx" in names and shutil.which("nginx"):
        told = subprocess.run(["nginx", "-v"], capture_output=True, text=True, check=False).stderr
        found["nginx"] = told.strip().rpartition("/")[2]
    if "litellm" in names and (LITELLM / "litellm").exists():
        code = "from importlib.metadata import version as v; print(v('litellm'))"
        told = subprocess.run([LITELLM / "python", "-c", code], capture_output=True, text=True, check=False).stdout
        found["litellm"] = told.strip()
    return found


def _gateway(folder: Path, port: int, replicas: Sequence[str]) -> list[str]:
    addresses = tuple(
        ReplicaAddress(id=f"r{number}", url=url, model=MODEL, max_num_seqs=4096) for number, url in enumerate(replicas)
    )
    routes = folder / "routes.json"
    routes.write_bytes(msgspec.json.encode(Routes(models=(ModelRoute(name=MODEL, replicas=addresses),)).as_dict()))
    options = [f"--port={port}", f"--routes={routes}", f"--database={folder / 'gateway.db'}", "--log-level=warning"]
    return [sys.executable, "-m", "powerband", "gateway", *options]


def _nginx(folder: Path, port: int, replicas: Sequence[str]) -> list[str]:
    """One worker, as the gateway is one process; kept connections; nothing buffered."""
    servers = "".join(f"server {url.partition('://')[2]};" for url in replicas)
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"""daemon off; user root; worker_processes 1; pid {folder}/pid; error_log {folder}/errors;
        worker_rlimit_nofile 16384;
        events {{ worker_connections 8192; }}
        http {{ access_log off; {temporary} keepalive_requests 1000000; client_body_buffer_size 64k;
          upstream replicas {{ {servers} keepalive 1024; keepalive_requests 1000000; }}
          server {{ listen 127.0.0.1:{port} backlog=4096;
            location / {{ proxy_pass http://replicas; proxy_http_version 1.1; proxy_set_header Connection "";
              proxy_buffering off; proxy_request_buffering off; proxy_read_timeout 600s; }} }} }}"""
    )
    return ["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf")]


def _litellm(folder: Path, port: int, replicas: Sequence[str]) -> list[str]:
    """One worker, no database, no logging of requests."""
    listed = [
        {
            "model_name": MODEL,
            "litellm_params": {"model": f"openai/{MODEL}", "api_base": f"{url}/v1", "api_key": "none"},
        }
        for url in replicas
    ]
    settings = {"model_list": listed, "litellm_settings": {"telemetry": False, "set_verbose": False}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return [
        str(LITELLM / "litellm"),
        "--config",
        str(folder / "config.yaml"),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]


_COMMANDS = {"gateway": _gateway, "nginx": _nginx, "litellm": _litellm}


def _environment() -> dict[str, str]:
    """LiteLLM would fetch a list of prices, and not start without keys; nobody else is asked for one here."""
    unlocked = "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY"
    return {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", unlocked: "true"}


def _wait_for(found: Proxy, log: Path) -> None:
    """Until it passes on a request."""
    body = b'{"model":"scripted","messages":[{"role":"user","content":"a"}],"max_tokens":1}'
    headers = {"Content-Type": "application/json", "Authorization": "Bearer none"}
    deadline_s = time.monotonic() + _START_S
    while time.monotonic() < deadline_s:
        if found.process is not None and found.process.poll() is not None:
            break
        request = urllib.request.Request(f"{found.url}/v1/chat/completions", body, headers)  # noqa: S310 (loopback)
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5) as answer:  # noqa: S310 (loopback)
            if answer.status == 200:
                return
        time.sleep(0.1)
    raise RuntimeError(f"{found.name} does not start: {log.read_text()[-1500:]}")


def _family(pid: int) -> list[int]:
    """A process and all that came from it."""
    found = [pid]
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in re.findall(r"\d+", (task / "children").read_text()):
                found += _family(int(child))
    return found
