"""The property test is worth something only if it notices faults: plant them, one at a time, and see.

Each fault is one replacement in a copy of the package, and a process of its own plays traces against the copy.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import powerband

PACKAGE = Path(powerband.__file__).parent
HERE = Path(__file__).parent

PLAY = """
import sys
import powerband
from core_device import Config
from core_world import play
assert powerband.__file__.startswith(sys.argv[1]), powerband.__file__
for seed in range(3):
    play(Config(seed=seed, overlap=True, num_blocks=28, failures=0.02, drafts=True, interruptions=True, policy="fair"))
    play(Config(seed=seed, overlap=True, num_blocks=128, max_num_seqs=6))
    play(Config(seed=seed, overlap=True, num_blocks=40, chunk=8, policy="longest-prefix", burst=True))
    play(Config(seed=seed, num_blocks=28, drafts=True))
    play(Config(seed=seed, num_blocks=99, budget=16, policy="priority", burst=True))
    play(Config(seed=seed, overlap=True, num_blocks=150, budget=24, failures=0.05, burst=True))
for seed in (5, 27):
    play(Config(seed=seed, num_stages=4, num_blocks=150, budget=24, chunk=8, failures=0.05, burst=True))
"""


@dataclass(frozen=True)
class Fault:
    name: str
    file: str
    right: str
    wrong: str


FAULTS = [
    Fault("results of an older epoch count", "scheduler", "if r is None or r.epoch != w.epoch:", "if r is None:"),
    Fault("preemption keeps the epoch", "scheduler", "        r.epoch = self._next_epoch()\n", ""),
    Fault("an id used again keeps its epoch", "scheduler", "epoch=self._next_epoch())", "epoch=0)"),
    Fault(
        "preemption keeps what is pending",
        "scheduler",
        "r.num_computed = r.num_pending = r.inflight = 0",
        "r.num_computed = r.inflight = 0",
    ),
    Fault("rejected drafts count as computed", "results", "r.num_computed -= 1 + len(w.drafts) - len(got)", "pass"),
    Fault(
        "tokens after a stop are told",
        "results",
        "return got[:kept], FinishReason.STOP",
        "return got, FinishReason.STOP",
    ),
    Fault("min_tokens is ignored", "results", " and r.num_output >= r.params.min_tokens", ""),
    Fault("one token too many", "results", "if len(tokens) >= r.max_length", "if len(tokens) > r.max_length"),
    Fault("rows of a prompt are told twice", "results", "rows[max(r.num_prompt_rows - w.start, 0) :]", "rows"),
    Fault("a block is offered before it is full", "kv_cache", "min(r.num_computed, len(r.tokens))", "len(r.tokens)"),
    Fault("doubtful blocks are offered again", "kv_cache", "return min(end, r.max_published)", "return end"),
    Fault("hits are not held", "kv_cache", "        self.pool.hold(match.blocks)\n", ""),
    Fault(
        "a whole prompt is matched",
        "kv_cache",
        "range((len(r.tokens) - 1) // self.block_size)",
        "range(len(r.tokens) // self.block_size)",
    ),
    Fault("idle hits count as free", "kv_cache", "need + match.num_idle + reserve", "need + reserve"),
    Fault("prompt log-probabilities read the cache", "kv_cache", " or r.params.prompt_logprobs is not None", ""),
    Fault("keys are not chained", "kv_cache", "sha256(key + self._pack", "sha256(r.salt + self._pack"),
    Fault("head first", "kv_cache", "range(len(r.blocks) - 1, -1, -1)", "range(len(r.blocks))"),
    Fault("a twin grows old", "kv_cache", "            self.pool.touch(twin)", "            pass"),
    Fault(
        "a failed request's blocks stay findable",
        "kv_cache",
        "            self.pool.forget(block)\n        self._forget",
        "            pass\n        self._forget",
    ),
    Fault(
        "what follows a failed block stays findable",
        "kv_cache",
        "        self._forget_behind(r.block_keys[first:])\n",
        "",
    ),
    Fault(
        "a reset forgets nothing of the running",
        "kv_cache",
        "            r.num_published = r.max_published = 0",
        "            pass",
    ),
    Fault("tenants share", "request", "for part in (tenant, cache_salt)]", "for part in ()]"),
    Fault("salts share", "request", "for part in (tenant, cache_salt)]", "for part in (tenant,)]"),
    Fault(
        "evicted blocks stay findable",
        "block_pool",
        "                self._remove_key(block)\n            self.refs",
        "                pass\n            self.refs",
    ),
    Fault(
        "evictions are not told",
        "block_pool",
        'self.events.append(CacheEvent("removed", key, self.parent_of[block]))',
        "pass",
    ),
    Fault(
        "a key is given twice",
        "block_pool",
        "if key not in self.block_of and self.key_of[block] is None:",
        "if self.key_of[block] is None:",
    ),
    Fault(
        "blocks of an ended request stay", "scheduler", "            self.kv.release(r)\n        else:", "        else:"
    ),
    Fault(
        "the budget is not charged",
        "scheduler",
        "            budget -= n\n            if dynamic",
        "            if dynamic",
    ),
    Fault(
        "the budget is not charged for new requests",
        "scheduler",
        "            budget -= n\n            if self.policy",
        "            if self.policy",
    ),
    Fault(
        "prefills eat the budget of decodes",
        "scheduler",
        "min(n, self._chunk, budget - reserved)",
        "min(n, self._chunk, budget)",
    ),
    Fault(
        "chunks are as long as the budget",
        "scheduler",
        "min(n, self._chunk, budget - reserved)",
        "min(n, budget - reserved)",
    ),
    Fault(
        "first chunks are as long as the budget",
        "scheduler",
        "r.num_computed, budget, self._chunk)",
        "r.num_computed, budget)",
    ),
    Fault("the relay is ignored", "scheduler", "if r.inflight > relay or r.drafting", "if r.drafting"),
    Fault("work on top of drafts", "scheduler", "if r.inflight > relay or r.drafting", "if r.inflight > relay"),
    Fault("pending tokens may pass the end", "scheduler", " or known >= r.max_length:", ":"),
    Fault(
        "one seat too many",
        "scheduler",
        "budget > 0 and len(self.running) < self.limits.max_num_seqs:\n            r =",
        "budget > 0 and len(self.running) <= self.limits.max_num_seqs:\n            r =",
    ),
    Fault("the first in order is preempted", "scheduler", "victim = self.running[-1]", "victim = self.running[0]"),
    Fault("the device is not told of the end", "scheduler", "        self._dropped.append(r.id)\n", ""),
    Fault(
        "a lost step takes its drops along",
        "scheduler",
        "[id for id in step.dropped if id not in self.requests] + self._dropped",
        "self._dropped",
    ),
    Fault(
        "a lost step leaves its blocks findable",
        "scheduler",
        "        self.kv.reset(self.running)\n        outputs",
        "        outputs",
    ),
    Fault(
        "a lost step leaves others running",
        "scheduler",
        "        for r in list(self.running):\n            self._preempt(r)\n",
        "",
    ),
    Fault(
        "readers of a failed request go on",
        "scheduler",
        "                if first is not None:",
        "                if False:",
    ),
    Fault(
        "preempted tokens are not counted as waiting",
        "scheduler",
        "        self.counters.num_preemptions += 1\n        self._num_waiting_tokens += len(r.tokens)\n",
        "        self.counters.num_preemptions += 1\n",
    ),
    Fault("pause is ignored", "scheduler", "        if self.paused:\n            return None\n", ""),
    Fault(
        "results in flight are forgotten",
        "loop",
        "            outputs += self._finish_oldest()\n        elif",
        "            outputs += self._finish_oldest() and []\n        elif",
    ),
]


def play_with(fault: Fault, folder: Path) -> str | None:
    """Return the last line of what the world said, or None when it noticed nothing."""
    package = folder / "powerband"
    package.mkdir(parents=True)
    for name in ("__init__.py", "errors.py"):
        shutil.copy(PACKAGE / name, package)
    for room in ("core", "spec"):
        shutil.copytree(PACKAGE / room, package / room, ignore=shutil.ignore_patterns("__pycache__"))
    path = package / "core" / f"{fault.file}.py"
    source = path.read_text()
    assert source.count(fault.right) == 1, f"{fault.name}: {source.count(fault.right)} places to plant it"
    path.write_text(source.replace(fault.right, fault.wrong))
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{HERE}", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", PLAY, str(folder)], env=environment, capture_output=True, text=True, timeout=60
        )
    except subprocess.TimeoutExpired:
        return "did not end"
    if done.returncode == 0:
        return None
    return done.stderr.strip().splitlines()[-1]


def test_every_planted_fault_is_caught(tmp_path: Path) -> None:
    no_fault = Fault("none", "scheduler", "class Scheduler:", "class Scheduler:")
    everything = [no_fault, *FAULTS]
    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(play_with, everything, (tmp_path / str(i) for i in range(len(everything)))))
    assert said[0] is None, said[0]
    survivors = [fault.name for fault, words in zip(FAULTS, said[1:], strict=True) if words is None]
    assert not survivors
    strangers = [words for words in said[1:] if words and words.startswith(("SyntaxError", "NameError", "ImportError"))]
    assert not strangers, "a fault must be wrong, not broken"
