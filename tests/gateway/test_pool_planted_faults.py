"""Random play finds what is wrong with a pool: plant faults, one at a time, and see that it does.

Each fault is one replacement in a copy of the gateway, and a process of its own plays against the copy: a fork of one
that has imported all that is heavy.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from pool_play import play

import powerband

PACKAGE = Path(powerband.__file__).parent
HERE = Path(__file__).parent

PLAY = """
import os, signal, sys, traceback
import powerband, powerband.core.loop, powerband.metrics.record, powerband.web.access, powerband.web.errors
for folder in sys.argv[1:]:
    pid = os.fork()
    if not pid:
        signal.alarm(60)
        powerband.__path__.insert(0, folder)
        try:
            from pool_play import play
            import powerband.gateway.dispatch.pool as planted
            assert planted.__file__.startswith(folder), planted.__file__
            for seed in range(100, 112):
                play(seed)
        except BaseException as problem:
            said = f"{type(problem).__name__}: {problem}"
        else:
            said = ""
        with open(f"{folder}/said", "w") as file:
            file.write(said)
        os._exit(0)
    os.waitpid(pid, 0)
"""


@dataclass(frozen=True)
class Fault:
    name: str
    file: str
    right: str
    wrong: str


FAULTS = [
    Fault("flapping costs nothing", "member", "if self._falls > 1:", "if False:"),
    Fault("one place too many", "member", "len(self.stays) < self.limit", "len(self.stays) <= self.limit"),
    Fault("a refused place is used", "member", "            and now_s >= self.busy_until_s\n", ""),
    Fault(
        "drained replicas get more", "member", "self.is_ready and not self.address.draining and", "self.is_ready and"
    ),
    Fault("one bad probe is enough", "member", "self._bad < self.options.fall:", "self._bad < 1:"),
    Fault("one good probe is enough", "member", "self._good < self.options.rise", "self._good < 1"),
    Fault(
        "good probes need not follow each other",
        "member",
        "        self._good = 0\n        self._bad += 1",
        "        self._bad += 1",
    ),
    Fault(
        "a new replica takes nothing from the queue",
        "pool",
        "        self._changed(self.clock())\n        if not member",
        "        self._lanes = arrange(self._lanes, self._members.values(), self.options)\n        if not member",
    ),
    Fault(
        "a free place is not given away",
        "pool",
        "        if self.queued:\n            self._dispatch(now_s)\n\n    def _may_open",
        "\n    def _may_open",
    ),
    Fault(
        "a cancelled request stays",
        "pool",
        "        if ticket.is_queued:\n            self._leave(ticket)\n",
        "        if ticket.is_queued:\n            pass\n",
    ),
    Fault("who is cancelled in the moment keeps the place", "pool", 'future.result().close("left")', "pass"),
    Fault(
        "a place for one who is gone",
        "pool",
        "        if ticket.future.done():  # cancelled, and about to say so\n",
        "        if False:\n",
    ),
    Fault("expired ones stay", "pool", "self._expire, ticket)", "self._abandon, ticket)"),
    Fault("closing twice frees twice", "lease", "            self._is_closed = True\n", ""),
    Fault(
        "prompts count until the end",
        "pool",
        "        lease.member.outstanding -= lease.request.prompt_tokens\n",
        "",
    ),
    Fault(
        "what a lease counts for is lost",
        "pool",
        "        member.outstanding -= lease.stay.tokens\n",
        "        member.outstanding -= lease.tokens\n",
    ),
    Fault(
        "second attempts are not elsewhere",
        "pool",
        "    return [member for member in free if member.id not in avoid]",
        "    return free",
    ),
    Fault(
        "second attempts are refused",
        "pool",
        "        if avoid:\n            expires_s",
        "        if False:\n            expires_s",
    ),
    Fault("long prompts go anywhere", "lanes", "if request.prompt_tokens <= lane.longest_prompt:", "if True:"),
    Fault(
        "short prompts wait for their own",
        "lanes",
        "lane.serving = serving = own or serving",
        "lane.serving = serving = own",
    ),
    Fault("what waits does not move along", "lanes", "                    target.queue.push(ticket)\n", ""),
    Fault(
        "last come, first served",
        "pool",
        "        first = next(iter(tickets))\n",
        "        first = list(tickets)[-1]\n",
    ),
    Fault(
        "priorities are upside down",
        "queue",
        "self._order = sorted(self._levels)",
        "self._order = sorted(self._levels, reverse=True)",
    ),
    Fault(
        "tokens are forgotten",
        "queue",
        "        self.requests -= 1\n        self.tokens -= ticket.tokens",
        "        self.requests -= 1",
    ),
    Fault(
        "a skipped tenant is lost",
        "queue",
        "        for entry in skipped:\n            heapq.heappush(self._heap, entry)\n",
        "",
    ),
    Fault(
        "a refunded tenant is lost",
        "queue",
        "        if tenant in self.flows:\n            self._offer(tenant)\n        elif",
        "        if",
    ),
    Fault("the queue has no bound", "admission", "if requests >= options.max_queued_requests:", "if False:"),
    Fault("deadlines are not kept", "admission", "latest_s = min(latest_s, deadline_s - self.service.bound_s)", "pass"),
]


def plant(fault: Fault, folder: Path) -> Path:
    shutil.copytree(PACKAGE / "gateway", folder / "gateway", ignore=shutil.ignore_patterns("__pycache__"))
    [path] = (folder / "gateway").rglob(f"{fault.file}.py")
    source = path.read_text()
    assert source.count(fault.right) == 1, f"{fault.name}: {source.count(fault.right)} places to plant it"
    path.write_text(source.replace(fault.right, fault.wrong))
    return folder


def play_with(folders: list[Path]) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{PACKAGE.parent}{os.pathsep}{HERE}", "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", PLAY, *map(str, folders)], env=environment, check=True, capture_output=True)


def test_every_planted_fault_is_caught(tmp_path: Path) -> None:
    everything = [Fault("none", "member", "class Member:", "class Member:"), *FAULTS]
    folders = [plant(fault, tmp_path / str(i)) for i, fault in enumerate(everything)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(play_with, (folders[::2], folders[1::2])))
    # Nothing is said by who was ended by the alarm: it never came to an end.
    said = [file.read_text() if (file := folder / "said").exists() else "did not end" for folder in folders]
    assert not said[0]
    assert not [fault.name for fault, words in zip(everything[1:], said[1:], strict=True) if not words]
    broken = ("SyntaxError", "NameError", "ImportError", "ModuleNotFoundError")
    assert not [words for words in said if words.startswith(broken)], "a fault must be wrong, not broken"


@pytest.mark.parametrize("routing", ["least-outstanding", "prefix", "session", "weighted"])
def test_a_pool_does_what_a_plain_model_says(routing: str) -> None:
    worlds = [play(seed, routing=routing) for seed in range(100, 105)]
    assert sum(world.grants for world in worlds) > 200
    assert {name for world in worlds for name in world.refused} >= {"PoolFull", "DeadlineInfeasible", "Expired"}
