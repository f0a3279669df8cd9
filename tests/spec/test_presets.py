"""Workloads by name hold what their docstrings say: the numbers are read from there, and checked."""

import inspect
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ks_2samp

from powerband.errors import UsageError
from powerband.spec.workload.arrivals import OpenLoop
from powerband.spec.workload.presets import PRESETS, preset
from powerband.spec.workload.traces import read_trace
from powerband.spec.workload.workload import Workload

# Public traces that are not part of the project; tests of them are left out where there are none.
TRACES = Path("/work/shared/data/traces")
AZURE = {"chat": TRACES / "azure_2023_conv.csv", "code": TRACES / "azure_2023_code.csv"}
REQUESTS = 20_000


def lengths_of(name):
    """Of each drawn request: all tokens of its prompt, those it did not share, output tokens."""
    made = preset(name)
    workload = Workload(name=name, arrivals=OpenLoop.at(1.0, made.burstiness), requests=made.mix)
    found = []
    for chain in workload.draw(0, num_requests=REQUESTS).chains:
        before = 0  # said so far in this conversation
        for request in chain.requests:
            own = request.segments[-1].tokens
            found.append((before + request.new_tokens, own, request.output_tokens))
            before += request.new_tokens + request.output_tokens
    return np.array(found).T


def told(name, pattern):
    """Numbers that a preset's docstring says."""
    found = re.search(pattern, re.sub(r"\s+", " ", inspect.getdoc(PRESETS[name])))
    assert found, f"{name} no longer says {pattern!r}"
    return [float(text.replace(",", "")) for text in found.groups()]


@pytest.mark.parametrize("name", ["chat", "code"])
def test_azures_lengths_are_as_told(name):
    mean, median, output_mean, output_median = told(
        name, r"prompts of mean ([\d,]+) and median ([\d,]+), outputs of mean (\d+) and median (\d+) tokens"
    )
    prompts, _, outputs = lengths_of(name)
    assert [np.mean(prompts), np.mean(outputs)] == pytest.approx([mean, output_mean], rel=0.03)
    assert [np.median(prompts), np.median(outputs)] == pytest.approx([median, output_median], rel=0.1)


@pytest.mark.parametrize("name", ["chat", "code"])
def test_azures_lengths_are_those_of_the_trace(name):
    """The nearest lognormals are 0.11 to 0.18 away."""
    if not AZURE[name].exists():
        pytest.skip(f"{AZURE[name]} is not on this machine")
    trace = read_trace(AZURE[name]).requests
    prompts, _, outputs = lengths_of(name)
    assert ks_2samp([r.segments[0].tokens for r in trace], prompts).statistic < 0.06
    assert ks_2samp([r.output_tokens for r in trace], outputs).statistic < 0.06
    assert np.mean([r.segments[0].tokens for r in trace]) == pytest.approx(np.mean(prompts), rel=0.03)
    assert np.mean([r.output_tokens for r in trace]) == pytest.approx(np.mean(outputs), rel=0.03)


@pytest.mark.parametrize(("name", "coefficient"), [("chat", 1.09), ("code", 4)])
def test_arrivals_are_as_bursty_as_told(name, coefficient):
    assert f"{coefficient}" in inspect.getdoc(PRESETS[name])
    assert 1 / math.sqrt(preset(name).burstiness) == pytest.approx(coefficient, rel=0.01)


def test_a_turn_of_a_conversation_is_as_told():
    prompt, answer = told("conversation", r"prompts of mean ([\d.]+) and answers of mean ([\d.]+) tokens")
    _, own, outputs = lengths_of("conversation")
    assert [np.mean(own), np.mean(outputs)] == pytest.approx([prompt, answer], rel=0.03)
    turns = preset("conversation").mix.conversation.turns
    assert [turns.low, turns.high, turns.mean] == told("conversation", r"(\d) to (\d) turns, mean (\d)")


def test_summaries_are_as_told():
    prompt, output = told("summarization", r"prompts of ([\d,]+) and outputs of (\d+) tokens")
    prompts, _, outputs = lengths_of("summarization")
    assert [np.mean(prompts), np.mean(outputs)] == pytest.approx([prompt, output], rel=0.03)


def test_retrieval_is_as_told():
    low, high, instructions, median = told(
        "rag", r"([\d,]+) to ([\d,]+) tokens of passages and question, (\d+) of instructions, answers of median (\d+)"
    )
    prompts, own, outputs = lengths_of("rag")
    assert [min(own), max(own)] == pytest.approx([low, high], rel=0.01)
    assert set(prompts - own) == {instructions}
    assert np.median(outputs) == pytest.approx(median, rel=0.02)


def test_an_agents_prompts_are_as_long_and_as_often_cached_as_told():
    mean, output, cached = told(
        "agent", r"prompts of mean ([\d,]+) and outputs of mean (\d+) tokens, (\d+) % of prompt tokens in the prefix"
    )
    prompts, own, outputs = lengths_of("agent")
    assert [np.mean(prompts), np.mean(outputs)] == pytest.approx([mean, output], rel=0.03)
    assert 1 - np.sum(own) / np.sum(prompts) == pytest.approx(cached / 100, abs=0.01)


def test_a_batch_is_the_same_request_again_and_again():
    prompt, output = told("offline", r"(\d+) prompt and (\d+) output tokens")
    prompts, _, outputs = lengths_of("offline")
    assert (set(prompts), set(outputs)) == ({prompt}, {output})


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_written_and_read(name):
    made = preset(name)
    workload = Workload(name=name, arrivals=OpenLoop.at(2.0, made.burstiness), requests=made.mix)
    assert Workload.from_dict(json.loads(json.dumps(workload.as_dict()))) == workload


def test_an_unknown_name_is_told_with_those_there_are():
    with pytest.raises(UsageError) as caught:
        preset("chatt")
    assert str(caught.value) == (
        "Unknown workload 'chatt'. There are: chat, conversation, rag, summarization, code, agent, offline, tools, "
        "structured."
    )
