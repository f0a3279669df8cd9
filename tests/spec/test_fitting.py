"""Requests that are longer than a context are cut to fit it, as little as it takes."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from powerband.errors import UsageError
from powerband.spec.workload.arrivals import ClosedLoop, OpenLoop
from powerband.spec.workload.fitting import refuse_cuts
from powerband.spec.workload.lengths import Empirical, Fixed, LogNormal, Uniform
from powerband.spec.workload.presets import PRESETS, preset
from powerband.spec.workload.schedule import Segment
from powerband.spec.workload.workload import (
    Conversation,
    RequestMix,
    RequestTrace,
    SharedPrefix,
    TracedRequest,
    Workload,
)


def drawn(mix, max_model_len, number=40, arrivals=None):
    made = Workload(name="test", arrivals=arrivals or OpenLoop.at(10.0), requests=mix)
    return made.within(max_model_len).draw(7, num_requests=number)


def lengths_of(schedule):
    """Tokens of each request with the conversation before it, by index."""
    found = {}
    for chain in schedule.chains:
        history = 0
        for request in chain.requests:
            history = history if request.turn else 0
            history += request.new_tokens + request.output_tokens
            found[request.index] = history
    return found


def shapes(schedule):
    return [
        ([segment.tokens for segment in request.segments], request.output_tokens, request.turn)
        for chain in schedule.chains
        for request in chain.requests
    ]


lengths = st.one_of(
    st.integers(1, 5000).map(Fixed),
    st.tuples(st.integers(1, 3000), st.integers(0, 3000)).map(lambda pair: Uniform(pair[0], sum(pair))),
    st.builds(LogNormal, st.floats(1, 3000), st.floats(0, 2), high=st.just(20_000)),
    st.lists(st.integers(1, 9000), min_size=1, max_size=5).map(lambda values: Empirical(tuple(values))),
)
mixes = st.builds(
    RequestMix,
    lengths,
    lengths,
    st.one_of(st.none(), st.builds(SharedPrefix, lengths, st.integers(1, 9), st.floats(0.1, 1), st.floats(0, 3))),
    st.one_of(st.none(), st.builds(Conversation, st.integers(1, 9).map(Fixed))),
)
parts = st.lists(st.integers(1, 3000), min_size=1, max_size=6)
rows = st.lists(st.tuples(parts, st.integers(1, 3000), st.sampled_from([None, "a", "b"])), min_size=1, max_size=20)


def trace_of(rows):
    requests = [
        TracedRequest(n, tuple(Segment(f"{n}/{m}", t, "text " * t) for m, t in enumerate(tokens)), output, talk)
        for n, (tokens, output, talk) in enumerate(rows)
    ]
    return RequestTrace({"file": "some.jsonl", "format": "records", "sha256": "a" * 64}, tuple(requests))


@given(
    mix=st.one_of(mixes, rows.map(trace_of)),
    arrivals=st.sampled_from([OpenLoop.at(3.0), ClosedLoop(3)]),
    max_model_len=st.integers(2, 9000),
)
def test_no_request_exceeds_the_context_whatever_the_workload(mix, arrivals, max_model_len):
    whole, fitted = (drawn(mix, limit, arrivals=arrivals) for limit in (None, max_model_len))
    after = lengths_of(fitted)
    assert max(after.values()) <= max_model_len
    assert all(min(tokens) >= 1 and output >= 1 for tokens, output, _ in shapes(fitted))
    assert [(c.start_s, [(r.index, r.think_s) for r in c.requests]) for c in whole.chains] == [
        (c.start_s, [(r.index, r.think_s) for r in c.requests]) for c in fitted.chains
    ]
    before = lengths_of(whole)
    if max(before.values()) <= max_model_len:
        assert fitted.chains == whole.chains
        assert fitted.cut is None
    else:
        assert fitted.cut is not None
        assert 1 <= fitted.cut.requests <= len(after)
        assert max_model_len < fitted.cut.max_tokens <= max(before.values())
    for chain in fitted.chains:
        for first, second in zip(chain.requests, chain.requests[1:], strict=False):
            assert second.turn in (0, first.turn + 1)


@pytest.mark.parametrize(
    ("prompt", "output", "left"),
    [
        (4000, 551, (1497, 551)),  # the answer keeps its room
        (10, 3000, (10, 2038)),  # a short prompt is left alone
        (4000, 3000, (1024, 1024)),
        (1500, 549, (1499, 549)),  # no more than it takes
        (1500, 548, (1500, 548)),
        (2049, 1, (2047, 1)),
        (1, 2048, (1, 2047)),
    ],
)
def test_the_prompt_is_cut_first_down_to_half_of_the_context(prompt, output, left):
    assert shapes(drawn(RequestMix(Fixed(prompt), Fixed(output)), 2048, 1)) == [([left[0]], left[1], 0)]


@pytest.mark.parametrize(
    ("shared", "own", "left"),
    [
        (96, 4000, [96, 1952]),  # instructions stay whole
        (1400, 1400, [1024, 1024]),  # ... up to half of the prompt
        (3000, 10, [2038, 10]),
        (3000, 3000, [1024, 1024]),
    ],
)
def test_of_a_prompt_its_own_text_is_cut_before_what_is_shared(shared, own, left):
    mix = RequestMix(Fixed(own), Fixed(52), SharedPrefix(Fixed(shared)))
    first, second = (chain.requests[0] for chain in drawn(mix, 2100, 2).chains)
    assert [segment.tokens for segment in first.segments] == left
    assert first.segments[0].key == second.segments[0].key
    assert first.segments[1].key != second.segments[1].key


def test_a_conversation_that_is_too_long_begins_again_with_its_instructions():
    mix = RequestMix(Fixed(300), Fixed(100), SharedPrefix(Fixed(50)), Conversation(Fixed(6)))
    schedule = drawn(mix, 1000, 6)
    assert shapes(schedule) == [
        ([50, 300], 100, 0),
        ([300], 100, 1),
        ([50, 300], 100, 0),
        ([300], 100, 1),
        ([50, 300], 100, 0),
        ([300], 100, 1),
    ]
    assert len({request.segments[0].key for request in schedule.chains[0].requests if request.turn == 0}) == 1
    assert schedule.cut_text == (
        "2 of 6 requests are longer than the context of 1,000 tokens (up to 1,250) and are cut to fit it."
    )


def test_recorded_text_is_cut_with_its_tokens():
    trace = trace_of([([1000], 24, None)])
    (chain,) = drawn(trace, 124).chains
    assert chain.requests[0].segments[0].text == "text " * 100
    assert chain.requests[0].segments[0].tokens == 100


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_fits_the_context_of_the_demo_model(name):
    schedule = drawn(preset(name).mix, 2048, 1000)
    assert max(lengths_of(schedule).values()) <= 2048


def test_a_context_stands_in_files_and_the_smaller_one_holds():
    made = Workload(name="test", arrivals=OpenLoop.at(1.0), requests=preset("chat").mix)
    assert "max_model_len" not in made.as_dict()
    fitted = made.within(2048)
    assert fitted.within(4096) == fitted.within(None) == fitted
    assert Workload.from_dict(json.loads(json.dumps(fitted.as_dict()))) == fitted
    assert fitted.within(1024).max_model_len == 1024
    with pytest.raises(UsageError, match=r"max_model_len is 1\."):
        made.within(1)


def test_strict_lengths_refuse_what_would_be_cut():
    refuse_cuts(drawn(RequestMix(Fixed(10), Fixed(10)), 2048, 3).cut, 3)
    with pytest.raises(UsageError) as caught:
        refuse_cuts(drawn(RequestMix(Fixed(3000), Fixed(10)), 2048, 3).cut, 3)
    assert caught.value.message == ("3 of 3 requests are longer than the context of 2,048 tokens, the longest 3,010.")
    with pytest.raises(UsageError, match=r"^1 of 1 request is longer than the context of 2,048 tokens, "):
        refuse_cuts(drawn(RequestMix(Fixed(3000), Fixed(10)), 2048, 1).cut, 1)
