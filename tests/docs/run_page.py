"""Types the commands of one page, in order, as somebody would who reads it on a machine of their own.

    python run_page.py PAGE FOLDER [--calibrated] [--only-plans]

FOLDER becomes that machine: a home, a working directory with the files that pages speak of, a Hugging Face cache with
stand-ins for the models that they name, and `powerband` on the path. Servers go on in the background, as in another
terminal. The first command that fails ends it, with its exit code and the end of what it printed. FOLDER's processes
are known by their HOME: none outlives the run, and one that is left by commands that all worked is a failure.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

from markdown_commands import ROOT, RUN, Block, blocks, powerband_lines, program, saved_files

from powerband.spec.hardware.catalog import read_profile, write_profile
from powerband.spec.hardware.device import detect_cpu

DEMO = ROOT / "src/powerband/demo"
KNOWN_PROFILE = ROOT / "tests/spec/written_by_0_1_0/here.yaml"
MODELS = {  # what stands in for a model of the hub: the demo model, which is a Qwen3; or its config.json, to plan for
    "Qwen/Qwen3-0.6B": None,
    "Qwen/Qwen3-8B": (4096, 36, 32, 8, 12288, 151936),
}
PORTS = {"serve": 8000, "gateway": 8080}  # unless a command says another
LIMIT_S = 240  # of one command, on a machine that is busy
READY_S = 120
# What a load says about a busy machine is no error: the SLO was missed, or the client could not keep up.
CODES = {"bench": (0, 1, 3), "simulate": (0, 1)}
PLANNING = ("calibrate", "plan", "simulate", "devices")
SHOWN_LINES = 40  # of what a command that failed has printed
MEANT_TO_LAST = (["logs"], ["-f"]), (["status"], ["--watch"])
LAST_S = 3


class Failed(Exception):
    """A command did not do what its page says."""


class Machine:
    def __init__(self, folder: Path, *, is_calibrated: bool, measures: bool) -> None:
        self.folder, self.home, self.work = folder, folder / "home", folder / "work"
        self.measures = measures
        self.variables = folder / "variables.sh"
        self.servers: dict[int, subprocess.Popen[bytes]] = {}  # by port
        self.environment = self._environment()
        self._prepare(is_calibrated)

    def run_block(self, block: Block, *, only_plans: bool) -> None:
        for command in () if only_plans else filter(None, block.first.split("; ")):
            self._run(command)
        for command in block.commands:
            if program(command) not in RUN:
                raise Failed(f"{program(command)} is not run here: say why above the block (tests leave out: …)")
            if not only_plans or any(line[0] in PLANNING for line in powerband_lines(command)):
                self._run(command)

    def _run(self, command: str) -> None:
        print(f"$ {command}", flush=True)
        began_s = time.monotonic()
        lines = powerband_lines(command)
        words = lines[0] if lines else []
        if words[:1] in (["serve"], ["gateway"]):
            self._serve(command)
        elif words == ["calibrate"] and not self.measures:
            self.calibrate()
        else:
            if ("localhost:8000" in command or "127.0.0.1:8000" in command) and not answers(8000):
                self._serve("powerband serve demo")
            is_endless = any(words[: len(head)] == head and set(tail) <= set(words) for head, tail in MEANT_TO_LAST)
            self._typed(command, words, is_endless=is_endless)
        if words[:1] == ["calibrate"]:
            self.calibrate()  # what was measured in a second, on a machine that others use, is no ground for a plan
        print(f"  {time.monotonic() - began_s:.1f} s", flush=True)

    def _typed(self, command: str, words: list[str], *, is_endless: bool) -> None:
        script = f"set -a; . {self.variables}; {command}\ncode=$?; export -p >{self.variables}; exit $code"
        process = subprocess.Popen(
            ["bash", "-c", script],
            cwd=self.work,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=LAST_S if is_endless else LIMIT_S)
        except subprocess.TimeoutExpired:
            self._interrupt(process, is_endless=is_endless)
            return
        expected = CODES.get(words[0] if words else "", (0,))
        if process.returncode not in expected:
            raise Failed(f"exit code {process.returncode}:\n{end_of(output)}")
        if program(command) == "curl" and re.search(rb'"error"\s*:\s*{', output):
            raise Failed(f"the server refused: {end_of(output)}")
        if words[:1] == ["bench"] and "--fault" not in words:
            self._check_loads(output)

    @staticmethod
    def _interrupt(process: subprocess.Popen[bytes], *, is_endless: bool) -> None:
        """Ctrl-C, for what goes on until then. Raises Failed for anything else, and for what goes on all the same."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            if is_endless:
                os.killpg(process.pid, signal.SIGINT)
                process.communicate(timeout=READY_S)
                return
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise Failed(f"did not end:\n{end_of(output)}")

    def _check_loads(self, output: bytes) -> None:
        """A load may miss its SLO here; that requests fail is our mistake, or the page's."""
        found = re.search(rb"report: (\S+)/report\.html", output)
        report = self.work / found[1].decode() / "run.json" if found else None
        for point in json.loads(report.read_text())["points"] if report else ():
            if point["errors"]:
                raise Failed(f"requests failed: {point['errors']}\n{end_of(output)}")

    def _serve(self, command: str) -> None:
        """Start a server in the background, in place of one at its port, and wait until it answers."""
        words = shlex.split(command.replace("\\\n", " "), comments=True)
        port = int(words[words.index("--port") + 1]) if "--port" in words else PORTS[words[1]]
        self._end_server(port)
        log = self.folder / f"server-{port}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {command}"],
                cwd=self.work,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self.servers[port] = process
        path = "/livez" if "gateway" in words else "/readyz"
        until_s = time.monotonic() + READY_S
        while not answers(port, path):
            if process.poll() is not None or time.monotonic() > until_s:
                raise Failed(f"is not ready (exit code {process.poll()}):\n{end_of(log.read_bytes())}")
            time.sleep(0.2)

    def _end_server(self, port: int) -> None:
        """As with Ctrl-C."""
        process = self.servers.pop(port, None)
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=READY_S)
            except subprocess.TimeoutExpired:
                raise Failed(f"the server at port {port} does not end on Ctrl-C") from None

    def remove_services(self) -> None:
        for service in (self.home / ".local/state/powerband").glob("*/desired.json"):
            self._run(f"powerband remove {service.parent.name}")
        for port in list(self.servers):
            self._end_server(port)

    def kill_all(self) -> None:
        """Until none is left: they may start others meanwhile."""
        while left := processes_of(self.home):
            for number in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            for process in self.servers.values():
                process.poll()
            time.sleep(0.05)

    def calibrate(self) -> None:
        """The profiles that a calibration leaves, from a stored one."""
        cpu, known = detect_cpu(), read_profile(KNOWN_PROFILE)
        profiles = self.home / ".cache/powerband/profiles"
        for threads in {cpu.cores, max(cpu.cores // 2, 1)}:
            if known.machine is None:
                raise AssertionError("it was measured on a machine")
            machine = replace(known.machine, name=cpu.name, cores=cpu.cores, threads=threads)
            name = "local.yaml" if threads == cpu.cores else f"local-{threads}-threads.yaml"
            write_profile(replace(known, machine=machine), profiles / name)

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("POWERBAND_", "HF_", "XDG_"))}
        return kept | {
            "HOME": str(self.home),
            "PATH": f"{self.folder / 'bin'}:{kept['PATH']}",
            "HF_HOME": str(self.folder / "hub"),
            "HF_ENDPOINT": "http://127.0.0.1:9",  # nothing is fetched
            "COLUMNS": "100",
        }

    def _prepare(self, is_calibrated: bool) -> None:
        for folder in (self.home / "models", self.work / ".venv/bin", self.folder / "bin"):
            folder.mkdir(parents=True)
        self.variables.touch()
        # Kernels are compiled once for all pages.
        kernels = Path(os.environ.get("POWERBAND_CACHE", Path.home() / ".cache/powerband")) / "kernels"
        kernels.mkdir(parents=True, exist_ok=True)
        (self.home / ".cache/powerband").mkdir(parents=True)
        (self.home / ".cache/powerband/kernels").symlink_to(kernels)
        short = Path(__file__).with_name("short_powerband.py")
        for place in (self.folder / "bin", self.work / ".venv/bin"):
            command = place / "powerband"
            command.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{short}" "$@"\n')
            command.chmod(0o755)
        shutil.copytree(DEMO, self.home / "models/my-model")
        for name, shape in MODELS.items():
            self._stand_in(name, shape)
        self._write_files()
        if is_calibrated:
            self.calibrate()

    def _stand_in(self, name: str, shape: tuple[int, ...] | None) -> None:
        """A model in the Hugging Face cache, as if it had been fetched."""
        model = self.folder / f"hub/hub/models--{name.replace('/', '--')}"
        revision = "0" * 40
        (model / "refs").mkdir(parents=True)
        (model / "refs/main").write_text(revision)
        snapshot = model / "snapshots" / revision
        if shape is None:
            shutil.copytree(DEMO, snapshot)
            return
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
        config = json.loads((DEMO / "config.json").read_text())
        config |= dict(zip((*names, "vocab_size"), shape, strict=True))
        config |= {"head_dim": 128, "max_position_embeddings": 40960, "tie_word_embeddings": False, "layer_types": None}
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text(json.dumps(config))

    def _write_files(self) -> None:
        """What pages speak of as the reader's own. ~/plan.yaml: that of plan-file.md, to be copied before a block."""
        for file in saved_files(ROOT / "docs/plan-file.md"):
            (self.home / file.name).write_text(file.content)
        rows = [f"2026-11-16 18:17:{second:02d}.0,{200 + 7 * second},{10 + second}" for second in range(0, 20, 2)]
        (self.work / "conversations.csv").write_text(
            "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "\n".join(rows) + "\n"
        )
        lines = [
            {"timestamp": 500 * n, "input_length": 300 + n, "output_length": 20, "hash_ids": [n]} for n in range(8)
        ]
        (self.work / "conversation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def answers(port: int, path: str = "/livez") -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def processes_of(home: Path) -> dict[int, str]:
    """Of the machine with this home, and the command of each."""
    found, variable = {}, f"HOME={home}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if variable in (process / "environ").read_bytes().split(b"\0"):
                found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")
    return found


def end_of(output: bytes) -> str:
    return "\n".join(output.decode(errors="replace").splitlines()[-SHOWN_LINES:])


def run(page: Path, machine: Machine, *, only_plans: bool, ends_s: float) -> None:
    """Raises Failed, with the command's place on the page."""
    for block in blocks(page):
        if block.left_out:
            continue
        try:
            machine.run_block(block, only_plans=only_plans)
        except Failed as problem:
            raise Failed(f"in the block at {page.name}:{block.line}: {problem}") from None
    machine.remove_services()
    until_s = time.monotonic() + ends_s
    while left := processes_of(machine.home):
        if time.monotonic() > until_s:
            raise Failed(f"processes are left: {left}")
        time.sleep(0.1)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("page", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--calibrated", action="store_true", help="begin on a machine that has been calibrated")
    parser.add_argument("--only-plans", action="store_true", help="only commands that plan")
    parser.add_argument(
        "--ends-s", type=float, default=30.0, help="until all processes that were asked to end are gone"
    )
    arguments = parser.parse_args()
    # Whoever starts this in the background has Ctrl-C ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # A calibration is the same on every page, and measured on its own.
    measures = arguments.page.name == "calibration.md"
    machine = Machine(arguments.folder, is_calibrated=arguments.calibrated, measures=measures)
    for file in saved_files(arguments.page):
        (machine.work / file.name).write_text(file.content)
    try:
        run(arguments.page, machine, only_plans=arguments.only_plans, ends_s=arguments.ends_s)
    except Failed as problem:
        print(f"FAILED {problem}", flush=True)
        return 1
    finally:
        machine.kill_all()
    return 0


if __name__ == "__main__":
    sys.exit(main())
