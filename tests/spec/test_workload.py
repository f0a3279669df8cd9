"""Workloads and the schedules drawn from them: reproducible, independent part by part, and complete."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare, expon, kstest

from powerband.bench.load import shards
from powerband.errors import UsageError
from powerband.spec.workload import workload as workload_module
from powerband.spec.workload.arrivals import ClosedLoop, OpenLoop, RatePhase, Replay
from powerband.spec.workload.lengths import Empirical, Fixed, LogNormal, Uniform
from powerband.spec.workload.schedule import Segment
from powerband.spec.workload.workload import (
    MAX_REQUESTS,
    Conversation,
    RequestMix,
    RequestTrace,
    SharedPrefix,
    TracedRequest,
    Workload,
)

PLAIN = RequestMix(Uniform(10, 100), LogNormal(50, 1.0, high=400))
TALKS = RequestMix(
    Uniform(10, 100), Uniform(1, 50), SharedPrefix(Fixed(64), groups=3), Conversation(Uniform(1, 5), 2.0)
)


def workload(requests=PLAIN, arrivals=None):
    return Workload(name="test", arrivals=arrivals or OpenLoop.at(10.0), requests=requests)


def traced(*rows):
    """(time, conversation) each; the prompt's key is the row's number."""
    made = [TracedRequest(time_s, (Segment(f"row {n}", 10 + n),), 5 + n, talk) for n, (time_s, talk) in enumerate(rows)]
    return RequestTrace({"file": "some.jsonl", "format": "records", "sha256": "a" * 64}, tuple(made))


def requests_of(schedule):
    return [request for chain in schedule.chains for request in chain.requests]


# --- reproducible ----------------------------------------------------------------------------------------------------

lengths = st.one_of(
    st.integers(1, 500).map(Fixed),
    st.tuples(st.integers(1, 500), st.integers(0, 500)).map(lambda pair: Uniform(pair[0], sum(pair))),
    st.builds(LogNormal, st.floats(1, 500), st.floats(0, 2), high=st.just(2000)),
    st.lists(st.integers(1, 500), min_size=1, max_size=5).map(lambda values: Empirical(tuple(values))),
)
few = st.one_of(st.integers(1, 6).map(Fixed), st.just(Uniform(1, 4)))
mixes = st.builds(
    RequestMix,
    lengths,
    lengths,
    st.one_of(st.none(), st.builds(SharedPrefix, lengths, st.integers(1, 9), st.floats(0.1, 1), st.floats(0, 3))),
    st.one_of(st.none(), st.builds(Conversation, few, st.floats(0, 5))),
)
arrivals = st.one_of(
    st.builds(OpenLoop.at, st.floats(0.1, 1000), st.sampled_from([0.25, 1.0, 4.0, math.inf])),
    st.builds(ClosedLoop, st.integers(1, 20), st.floats(0, 5)),
    st.just(OpenLoop((RatePhase(0, 50, 20), RatePhase(50, 50)))),
)
workloads = st.builds(workload, mixes, arrivals)
seeds = st.integers(0, 2**63)


@given(workload=workloads, seed=seeds, number=st.integers(1, 60))
def test_the_same_seed_is_the_same_schedule(workload, seed, number):
    read_again = Workload.from_dict(json.loads(json.dumps(workload.as_dict(), allow_nan=False)))
    assert read_again == workload
    first, second = workload.draw(seed, num_requests=number), read_again.draw(seed, num_requests=number)
    assert first == second
    assert first.digest() == second.digest()


@given(workload=workloads, seed=seeds, number=st.integers(1, 60))
def test_every_request_occurs_once(workload, seed, number):
    schedule = workload.draw(seed, num_requests=number)
    assert sorted(request.index for request in requests_of(schedule)) == list(range(number))
    assert schedule.num_requests == number
    starts = [chain.start_s for chain in schedule.chains]
    assert starts == sorted(starts)


@given(workload=workloads, seed=seeds)
def test_fewer_requests_are_the_first_of_more(workload, seed):
    if isinstance(workload.arrivals, ClosedLoop):
        workload = replace(workload, arrivals=OpenLoop.at(1.0))  # how users share requests depends on their number
    few, many = (workload.draw(seed, num_requests=number) for number in (10, 30))
    assert requests_of(few) == requests_of(many)[:10]


@given(mix=mixes, other=lengths, arrivals=arrivals, seed=seeds)
def test_other_outputs_move_neither_arrivals_nor_prompts(mix, other, arrivals, seed):
    first = workload(mix, arrivals).draw(seed, num_requests=40)
    second = workload(replace(mix, output=other), arrivals).draw(seed, num_requests=40)
    assert [chain.start_s for chain in first.chains] == [chain.start_s for chain in second.chains]
    assert [(r.index, r.segments, r.turn, r.think_s) for r in requests_of(first)] == [
        (r.index, r.segments, r.turn, r.think_s) for r in requests_of(second)
    ]


@given(mix=mixes, rate=st.floats(0.1, 1000), seed=seeds)
def test_twice_the_rate_sends_the_same_requests_twice_as_fast(mix, rate, seed):
    slow, fast = (workload(mix, OpenLoop.at(r)).draw(seed, num_requests=40) for r in (rate, 2 * rate))
    assert requests_of(slow) == requests_of(fast)
    assert [chain.start_s / 2 for chain in slow.chains] == pytest.approx([chain.start_s for chain in fast.chains])


@given(workload=workloads, seed=seeds, workers=st.integers(1, 8))
def test_workers_share_the_schedule_without_changing_it(workload, seed, workers):
    schedule = workload.draw(seed, num_requests=50)
    shares = shards(schedule, workers)
    assert len(shares) == min(workers, len(schedule.chains))
    assert all(shares)
    dealt = sorted((chain for share in shares for chain in share), key=lambda chain: chain.number)
    assert [chain.number for chain in dealt] == list(range(len(schedule.chains)))
    assert [_plain(chain) for chain in dealt] == [_plain(chain) for chain in schedule.chains]
    largest, smallest = max(map(len, shares)), min(map(len, shares))
    assert largest - smallest <= 1


def _plain(chain):
    """A Chain, or the message that is made of it."""
    requests = [
        (r.index, [(s.key, s.tokens, s.text) for s in r.segments], r.output_tokens, r.turn, r.think_s)
        for r in chain.requests
    ]
    return chain.start_s, requests


def test_the_digest_tells_every_difference():
    base = workload(TALKS).draw(0, num_requests=20)
    request = base.chains[0].requests[0]
    changed = [
        replace(request, index=99),
        replace(request, turn=1),
        replace(request, think_s=0.001),
        replace(request, output_tokens=request.output_tokens + 1),
        replace(request, segments=(*request.segments[:-1], Segment("other", request.segments[-1].tokens))),
        replace(request, segments=(*request.segments[:-1], replace(request.segments[-1], text="said"))),
    ]
    chains = [replace(base.chains[0], requests=(one, *base.chains[0].requests[1:])) for one in changed]
    chains.append(replace(base.chains[0], start_s=base.chains[0].start_s + 1e-6))
    others = [replace(base, chains=(chain, *base.chains[1:])) for chain in chains]
    others += [replace(base, duration_s=5.0), workload(TALKS).draw(1, num_requests=20)]
    assert len({schedule.digest() for schedule in (base, *others)}) == 1 + len(others)


def test_a_schedule_is_the_same_on_every_machine_and_version():
    """Whoever changes this digest changes what every stored seed means: say so in the changelog."""
    schedule = workload(TALKS, OpenLoop.at(5.0, 0.25)).draw(42, duration_s=30.0)
    assert schedule.digest() == "512729a0e0425d4caf6d73c1fa31d68fb436e6bce674eef2950808729348b06d"


# --- what requests are -----------------------------------------------------------------------------------------------


def test_prompts_are_shared_as_the_prefix_says():
    prefix = SharedPrefix(Fixed(64), groups=4, share=0.75, skew=1.0)
    requests = requests_of(workload(replace(PLAIN, prefix=prefix)).draw(0, num_requests=4000))
    shared = [r.segments[0].key for r in requests if len(r.segments) == 2]
    assert len(shared) / 4000 == pytest.approx(0.75, abs=0.03)
    weights = np.array([1, 1 / 2, 1 / 3, 1 / 4])
    counts = [shared.count(f"0/prefix {group}") for group in range(4)]
    assert chisquare(counts, len(shared) * weights / weights.sum()).pvalue > 0.01
    own = [r.segments[-1].key for r in requests]
    assert len(set(own)) == 4000


def test_a_conversation_shares_once_and_thinks_between_turns():
    schedule = workload(TALKS, OpenLoop.at(1.0)).draw(0, num_requests=3000)
    for chain in schedule.chains:
        assert [request.turn for request in chain.requests] == list(range(len(chain.requests)))
        assert [len(request.segments) for request in chain.requests] == [2] + [1] * (len(chain.requests) - 1)
        assert chain.requests[0].think_s == 0
    thinking = [request.think_s for request in requests_of(schedule) if request.turn]
    assert len(thinking) > 1000
    assert kstest(thinking, expon(scale=2.0).cdf).pvalue > 0.01


def test_other_seeds_are_other_texts():
    first, second = (requests_of(workload(TALKS).draw(seed, num_requests=50)) for seed in (1, 2))
    assert not {s.key for r in first for s in r.segments} & {s.key for r in second for s in r.segments}


# --- when it ends ----------------------------------------------------------------------------------------------------


def test_arrivals_end_before_the_duration():
    schedule = workload().draw(0, duration_s=50.0)
    assert 49 < schedule.chains[-1].start_s < 50
    assert schedule.num_requests == pytest.approx(500, abs=70)
    assert workload().draw(0, duration_s=50.0, num_requests=100).num_requests == 100
    assert workload().draw(0, duration_s=5.0, num_requests=100).num_requests < 100


def test_a_conversation_is_cut_where_the_requests_end():
    mix = replace(TALKS, conversation=Conversation(Fixed(4)))
    schedule = workload(mix).draw(0, num_requests=10)
    assert [len(chain.requests) for chain in schedule.chains] == [4, 4, 2]


@pytest.mark.parametrize(
    ("arrivals", "end", "sentence"),
    [
        (OpenLoop.at(1.0), {}, "Nothing ends this load."),
        (OpenLoop.at(1.0), {"duration_s": 0.0}, "The load lasts 0 s."),
        (OpenLoop.at(1.0), {"duration_s": math.nan}, "The load lasts nan s."),
        (OpenLoop.at(1.0), {"num_requests": 0}, "0 requests."),
        (OpenLoop.at(1.0), {"num_requests": MAX_REQUESTS + 1}, "2000001 requests."),
        (OpenLoop.at(0.001), {"duration_s": 1.0}, "No request arrives within 1 s."),
        (OpenLoop.at(5e-324), {"num_requests": 1}, "No request arrives within inf s."),
        (ClosedLoop(5), {}, "Nothing ends this load."),
    ],
)
def test_a_load_without_an_end_or_a_request_is_refused(arrivals, end, sentence):
    with pytest.raises(UsageError) as caught:
        workload(PLAIN, arrivals).draw(0, **end)
    assert caught.value.message == sentence


def test_a_load_that_would_be_cut_silently_is_refused(monkeypatch):
    monkeypatch.setattr(workload_module, "MAX_REQUESTS", 100)
    with pytest.raises(UsageError, match="More than 100 requests"):
        workload(PLAIN, OpenLoop.at(100.0)).draw(0, duration_s=60.0)
    assert workload(PLAIN, OpenLoop.at(1.0)).draw(0, duration_s=60.0).num_requests < 100


# --- closed loops ----------------------------------------------------------------------------------------------------


def test_users_take_requests_in_turn():
    schedule = workload(PLAIN, ClosedLoop(3)).draw(0, num_requests=8)
    assert [[r.index for r in chain.requests] for chain in schedule.chains] == [[0, 3, 6], [1, 4, 7], [2, 5]]
    assert {chain.start_s for chain in schedule.chains} == {0.0}


def test_users_without_work_are_no_chains():
    assert len(workload(PLAIN, ClosedLoop(9)).draw(0, num_requests=4).chains) == 4


def test_users_think_before_each_conversation_and_as_it_says_within():
    schedule = workload(TALKS, ClosedLoop(10, think_s=7.0)).draw(0, num_requests=4000)
    between = [r.think_s for r in requests_of(schedule) if r.turn == 0]
    within = [r.think_s for r in requests_of(schedule) if r.turn]
    assert kstest(between, expon(scale=7.0).cdf).pvalue > 0.01
    assert kstest(within, expon(scale=2.0).cdf).pvalue > 0.01


def test_a_duration_alone_gives_users_more_than_they_will_get_done():
    assert workload(PLAIN, ClosedLoop(2)).draw(0, duration_s=5.0).num_requests == 20_000
    assert workload(PLAIN, ClosedLoop(200)).draw(0, duration_s=5.0).num_requests == 40_000


# --- traces ----------------------------------------------------------------------------------------------------------


def test_a_trace_is_replayed_at_its_times():
    schedule = workload(traced((0, None), (1.5, None), (4, None)), Replay()).draw(0)
    assert [chain.start_s for chain in schedule.chains] == [0, 1.5, 4]
    assert [r.segments[0].key for r in requests_of(schedule)] == ["row 0", "row 1", "row 2"]
    assert [r.output_tokens for r in requests_of(schedule)] == [5, 6, 7]


def test_a_replay_may_be_faster_and_shorter():
    trace = traced((0, None), (1.5, None), (4, None))
    assert [c.start_s for c in workload(trace, Replay(2)).draw(0).chains] == [0, 0.75, 2]
    assert len(workload(trace, Replay()).draw(0, duration_s=4.0).chains) == 2
    assert len(workload(trace, Replay()).draw(0, num_requests=1).chains) == 1


def test_a_traces_conversations_are_chains():
    trace = traced((0, "a"), (1, "b"), (2, "a"), (3, None), (4, "b"), (5, None))
    schedule = workload(trace, Replay()).draw(0)
    told = [
        (chain.start_s, [(r.index, r.turn, r.segments[0].key) for r in chain.requests]) for chain in schedule.chains
    ]
    assert told == [
        (0, [(0, 0, "row 0"), (1, 1, "row 2")]),
        (1, [(2, 0, "row 1"), (3, 1, "row 4")]),
        (3, [(4, 0, "row 3")]),
        (5, [(5, 0, "row 5")]),
    ]


def test_a_trace_may_be_sent_at_another_rate_or_by_users():
    trace = traced(*((n, None) for n in range(50)))
    schedule = workload(trace, OpenLoop.at(10.0)).draw(0)
    assert len(schedule.chains) == 50
    assert np.mean([b.start_s - a.start_s for a, b in pairwise(schedule.chains)]) == pytest.approx(0.1, rel=0.5)
    assert [len(chain.requests) for chain in workload(trace, ClosedLoop(4)).draw(0).chains] == [13, 13, 12, 12]


def test_users_of_a_trace_get_all_of_it(monkeypatch):
    monkeypatch.setattr(workload_module, "_OPEN_ENDED", 10)
    monkeypatch.setattr(workload_module, "_OPEN_ENDED_EACH", 1)
    trace = traced(*((n, None) for n in range(50)))
    assert workload(trace, ClosedLoop(4)).draw(0, duration_s=9.0).num_requests == 50


def test_a_trace_is_named_in_files_and_must_be_the_same():
    trace = traced((0, None), (1, None))
    original = workload(trace, Replay(2.0))
    written = json.loads(json.dumps(original.as_dict()))
    assert Workload.from_dict(written, trace) == original
    with pytest.raises(UsageError, match=r"The workload is the trace some\.jsonl\. Name it with --trace\."):
        Workload.from_dict(written)
    other = replace(trace, source={**trace.source, "sha256": "b" * 64})
    with pytest.raises(UsageError, match="is not the trace of this workload: its SHA-256 differs"):
        Workload.from_dict(written, other)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: workload(PLAIN, Replay()), "Only a trace can be replayed."),
        (lambda: workload(traced((0, None), (0, None)), Replay()), "The trace some.jsonl has no times."),
        (lambda: RequestTrace({"file": "none.csv"}, ()), "The trace none.csv has no requests."),
        (lambda: Conversation(Uniform(1, 1001)), "A conversation of up to 1001 turns."),
        (lambda: Conversation(LogNormal(3, 1)), "A conversation of up to 16777216 turns."),
        (lambda: Conversation(Fixed(2), -1.0), "think_s is -1.0."),
        (lambda: Conversation(Fixed(2), math.inf), "think_s is inf."),
        (lambda: SharedPrefix(Fixed(2), groups=0), "A shared prefix: groups 0, share 1.0, skew 0.0."),
        (lambda: SharedPrefix(Fixed(2), groups=1.5), "A shared prefix: groups 1.5, share 1.0, skew 0.0."),
        (lambda: SharedPrefix(Fixed(2), share=math.nan), "A shared prefix: groups 1, share nan, skew 0.0."),
    ],
)
def test_what_does_not_go_together_is_refused(make, sentence):
    with pytest.raises(UsageError) as caught:
        make()
    assert caught.value.message == sentence


GOOD = workload(TALKS).as_dict()


@pytest.mark.parametrize(
    "change",
    [
        {"name": None, "arrivals": None},
        {"arrivals": "often"},
        {"arrivals": {"kind": "replay"}},
        {"requests": None},
        {"requests": 5},
        {"requests": []},
        {"requests": {}},
        {"requests": {"trace": "file.csv"}},
        {"requests": {"trace": {}}},
        {"requests": {**GOOD["requests"], "prompt": None}},
        {"requests": {**GOOD["requests"], "prefx": None}},
        {"requests": {**GOOD["requests"], "prefix": {}}},
        {"requests": {**GOOD["requests"], "prefix": "shared"}},
        {"requests": {**GOOD["requests"], "prefix": {"tokens": {"kind": "fixed", "tokens": 5}, "groups": "3"}}},
        {"requests": {**GOOD["requests"], "prefix": {"tokens": {"kind": "fixed", "tokens": 5}, "group": 3}}},
        {"requests": {**GOOD["requests"], "conversation": []}},
        {"requests": {**GOOD["requests"], "conversation": {"turns": {"kind": "fixed", "tokens": 10**6}}}},
        {"requests": {**GOOD["requests"], "conversation": {"turns": {"kind": "fixed", "tokens": 2}, "think_s": "1"}}},
        {"rate": 5},
    ],
    ids=str,
)
def test_what_is_no_workload_is_a_usage_error(change):
    assert Workload.from_dict(GOOD) == workload(TALKS)
    with pytest.raises(UsageError) as caught:
        Workload.from_dict({**GOOD, **change})
    assert len(caught.value.message) < 400


@pytest.mark.parametrize("values", [None, 5, [], "chat", {}, {"name": "x"}], ids=str)
def test_what_is_no_workload_at_all_is_a_usage_error(values):
    with pytest.raises(UsageError, match="This is not a valid workload"):
        Workload.from_dict(values)
