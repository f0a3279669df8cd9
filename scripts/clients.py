"""Run the official clients unmodified against a server and a gateway, and write docs/clients.md: `make clients`.

Each client has an environment of its own below build/clients, into which pip installs its latest version.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ROOT / "build" / "clients"
PROGRAMS = ROOT / "tests" / "clients"
PAGE = ROOT / "docs" / "clients.md"
BEGIN, END = "<!-- written by scripts/clients.py -->\n", "<!-- end -->\n"
_START_S = 120.0
_RUN_S = 600.0


@dataclass(frozen=True)
class Client:
    name: str  # of its environment
    package: str  # whose version is shown
    requirements: tuple[str, ...]
    program: str


CLIENTS = (
    Client("openai-3", "openai", ("openai>=3,<4",), "openai_client.py"),
    Client("openai-2", "openai", ("openai>=2,<3",), "openai_client.py"),
    Client("anthropic", "anthropic", ("anthropic",), "anthropic_client.py"),
    Client("langchain", "langchain-openai", ("langchain-openai", "langchain-anthropic"), "langchain_client.py"),
    Client("litellm", "litellm", ("litellm",), "litellm_client.py"),
    Client(
        "llamaindex",
        "llama-index-llms-openai-like",
        ("llama-index-llms-openai-like", "llama-index-embeddings-openai-like"),
        "llamaindex_client.py",
    ),
    Client("instructor", "instructor", ("instructor", "anthropic"), "instructor_client.py"),
    Client("pydantic-ai", "pydantic-ai-slim", ("pydantic-ai-slim[openai,anthropic]",), "pydantic_ai_client.py"),
)


@dataclass
class Outcome:
    """What a client could do. problems: by feature; '' where it works."""

    version: str
    problems: dict[str, str] = field(default_factory=dict)


def install(client: Client) -> Path:
    """Its environment's Python."""
    folder = ENVIRONMENTS / client.name
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write("torch<0\n")  # no client needs it
        constraints.flush()
        pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "-U", "-c", constraints.name]
        subprocess.run([*pip, *client.requirements], check=True)
    return python


def version(python: Path, package: str) -> str:
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def run(client: Client, python: Path, url: str, model: str) -> Outcome:
    found = Outcome(version(python, client.package))
    command = [str(python), str(PROGRAMS / client.program), url, model]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_RUN_S, check=False)
    except subprocess.TimeoutExpired:
        found.problems["(program)"] = f"it took longer than {_RUN_S:g} s"
        return found
    for line in done.stdout.splitlines():
        with contextlib.suppress(ValueError):
            reported = json.loads(line)
            found.problems[reported["feature"]] = reported["problem"]
    if done.returncode or not found.problems:
        found.problems["(program)"] = done.stderr.strip().rpartition("\n")[2] or "it reported nothing"
    return found


@contextlib.contextmanager
def running(*arguments: str) -> Iterator[str]:
    """A `powerband` command that serves; yields its URL once it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "powerband", *arguments, f"--port={port}"])
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(process, f"{url}/readyz")
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait(process: subprocess.Popen[bytes], url: str) -> None:
    end_s = time.monotonic() + _START_S
    while time.monotonic() < end_s and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(url).status_code == 200:
                return
        time.sleep(0.2)
    raise SystemExit(f"error: {url} did not become ready")


def table(outcomes: Sequence[tuple[Client, Outcome, Outcome]]) -> str:
    rows = ["| client | feature | replica | gateway |", "|---|---|---|---|"]
    for client, direct, proxied in outcomes:
        for feature in dict.fromkeys((*direct.problems, *proxied.problems)):
            marks = ["no" if one.problems.get(feature, "missing") else "yes" for one in (direct, proxied)]
            rows.append(f"| {client.package} {direct.version} | {feature} | {marks[0]} | {marks[1]} |")
    return "\n".join(rows) + "\n"


def write(text: str) -> None:
    page = PAGE.read_text()
    head, _, rest = page.partition(BEGIN)
    PAGE.write_text(head + BEGIN + "\n" + text + "\n" + END + rest.partition(END)[2])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", help="name of a client; repeat for several: the page is not written")
    parser.add_argument("--no-install", action="store_true", help="use the environments as they are")
    parser.add_argument("--serve-args", default="", help="more arguments for `powerband serve demo`")
    arguments = parser.parse_args()
    names = [client.name for client in CLIENTS]
    if unknown := set(arguments.only or ()) - set(names):
        parser.error(f"there is no client {', '.join(sorted(unknown))}: choose from {', '.join(names)}")
    chosen = [client for client in CLIENTS if not arguments.only or client.name in arguments.only]
    pythons = {}
    for client in chosen:
        python = ENVIRONMENTS / client.name / "bin" / "python"
        pythons[client.name] = python if arguments.no_install else install(client)
    outcomes = []
    with contextlib.ExitStack() as stack:
        database = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "gateway.sqlite"
        replica = stack.enter_context(running("serve", "demo", "--convert=embed", *shlex.split(arguments.serve_args)))
        gateway = stack.enter_context(
            running("gateway", f"--replica={replica}", f"--database={database}", "--store-content")
        )
        for client in chosen:
            found = [run(client, pythons[client.name], url, "demo") for url in (replica, gateway)]
            outcomes.append((client, found[0], found[1]))
            for place, outcome in zip(("replica", "gateway"), found, strict=True):
                for feature, problem in outcome.problems.items():
                    shown = f"NO: {problem}" if problem else "yes"
                    sys.stdout.write(f"{client.package} {outcome.version}, {place}: {feature}: {shown}\n")
            sys.stdout.flush()
    if not arguments.only:
        write(table(outcomes))
    failed = sum(bool(problem) for _, *both in outcomes for outcome in both for problem in outcome.problems.values())
    sys.stdout.write(f"{failed} of all checks failed\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
