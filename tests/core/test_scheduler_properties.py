"""Whatever happens, every request yields exactly what it would yield alone, and everything is given back.

`core_world` says what is checked; here are the conditions under which it is.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from core_device import Config
from core_world import play
from hypothesis import given, settings
from hypothesis import strategies as st

from powerband.core.policy import POLICY_NAMES
from powerband.core.step import FinishReason

HERE = Path(__file__).parent


@pytest.mark.parametrize("policy", POLICY_NAMES)
@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_all_conditions(num_stages: int, policy: str) -> None:
    """Overlap, tight and roomy cache, chunks, drafts, failures: 16 combinations for each policy and pipeline depth."""
    seeds = itertools.count(1000 * num_stages + POLICY_NAMES.index(policy))
    preemptions = aborts = 0
    combinations = itertools.product((False, True), (24, 64), (0, 8), ((False, 0.02), (True, 0.0)))
    for overlap, num_blocks, chunk, (drafts, failures) in combinations:
        seed = next(seeds)
        config = Config(
            seed=seed,
            num_requests=24,
            num_stages=num_stages,
            overlap=overlap,
            num_blocks=num_blocks,
            chunk=chunk,
            policy=policy,
            drafts=drafts,
            failures=failures,
            burst=seed % 2 == 0,
            interruptions=seed % 3 == 0,
            moved=seed % 5 == 0,
            grammars=seed % 4 == 0,
        )
        report = play(config)
        preemptions += report.num_preemptions
        aborts += report.finished.get(FinishReason.ABORT, 0)
    assert preemptions > 50, "too easy a test"
    assert aborts > 10, "too easy a test"


CONDITIONS: dict[str, Any] = {
    "seed": st.integers(0, 10**6),
    "num_requests": st.integers(1, 40),
    "num_stages": st.sampled_from([1, 1, 2, 3, 4]),
    "overlap": st.booleans(),
    "moved": st.booleans(),
    "grammars": st.booleans(),
    "num_blocks": st.integers(2, 120),
    "block_size": st.sampled_from([1, 2, 4, 16]),
    "budget": st.integers(8, 64),
    "chunk": st.sampled_from([0, 0, 5, 16]),
    "max_num_seqs": st.integers(1, 8),
    "policy": st.sampled_from(POLICY_NAMES),
    "drafts": st.booleans(),
    "prefix_caching": st.sampled_from([True, True, False]),
    "failures": st.sampled_from([0.0, 0.0, 0.02]),
    "burst": st.booleans(),
    "interruptions": st.booleans(),
    "max_num_queued_reqs": st.sampled_from([1, 5, 1000]),
}


@settings(max_examples=40, derandomize=True)
@given(st.builds(Config, **CONDITIONS))
def test_any_condition(config: Config) -> None:
    play(config)


@settings(max_examples=60, derandomize=True)
@given(
    st.builds(Config, **CONDITIONS),
    st.sampled_from([(0, 1), (0, 1), (1, 1), (1, 2), (2, 1), (1, 6)]),
    st.integers(1, 40),
    st.integers(1, 4),
)
def test_any_condition_with_windows(config: Config, groups: tuple[int, int], window: int, times: int) -> None:
    """Layers with a window alone, and beside layers that see everything; windows shorter and longer than chunks."""
    full, windowed = groups
    num_blocks = config.num_blocks * (full + windowed) * times
    play(replace(config, full=full, windowed=windowed, window=window, num_blocks=num_blocks))


def test_same_trace_same_steps_under_any_hash_seed() -> None:
    code = (
        "from core_device import Config\nfrom core_world import play\n"
        "for policy in ('fcfs', 'longest-prefix', 'fair'):\n"
        "    print(play(Config(seed=5, policy=policy, overlap=True, num_blocks=40, failures=0.02)).steps)"
    )
    said = set()
    for hash_seed in ("0", "1", "4242"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(HERE)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        said.add(done.stdout)
    assert len(said) == 1
