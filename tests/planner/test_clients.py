"""Simulated clients: the keys of their prompts agree exactly as far as the prompts' tokens do."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from powerband.core.step import FinishReason
from powerband.dispatch.estimates import BYTES_PER_TOKEN
from powerband.dispatch.prefix import BLOCK_ENDS
from powerband.planner.simulation.clients import ConversationClient, SimulatedRequest
from powerband.spec.workload.schedule import Chain, PlannedRequest, Segment

SEGMENTS = st.lists(st.builds(Segment, st.sampled_from("abc"), st.integers(1, 400)), min_size=1, max_size=4)


def client(*segments: Segment) -> ConversationClient:
    return ConversationClient(Chain(0.0, (PlannedRequest(0, segments, 10),)))


@settings(max_examples=200)
@given(SEGMENTS, SEGMENTS)
def test_prompts_share_keys_exactly_as_far_as_they_begin_alike(first: list[Segment], second: list[Segment]) -> None:
    keys = [client(*segments).prefix_keys() for segments in (first, second)]
    prompts = [client(*segments).next_request(0.0).token_ids for segments in (first, second)]
    length = min(map(len, prompts))
    alike = next((i for i in range(length) if prompts[0][i] != prompts[1][i]), length)
    num_alike = sum(end <= alike * BYTES_PER_TOKEN for end in BLOCK_ENDS)
    shared = next((i for i, (a, b) in enumerate(zip(*keys, strict=False)) if a != b), min(map(len, keys)))
    assert shared == num_alike
    assert not set(keys[0][shared:]) & set(keys[1][shared:])


def test_a_later_turn_has_the_keys_of_all_that_was_said() -> None:
    first = PlannedRequest(0, (Segment("system", 300), Segment("question", 50)), 100)
    later = PlannedRequest(1, (Segment("next question", 200),), 10, turn=1)
    talk = ConversationClient(Chain(0.0, (first, later)))
    keys = talk.prefix_keys()
    talk.next_request(0.0)
    sent = SimulatedRequest(first, 0, 0.0, 350)
    sent.on_run([1.0 + i / 100 for i in range(100)], 0, 1)
    talk.on_complete(sent.refused())
    assert talk.next is None, "a conversation that lost an answer does not go on"

    talk = ConversationClient(Chain(0.0, (first, later)))
    talk.prefix_keys()
    talk.next_request(0.0)
    talk.on_complete(sent.record(FinishReason.LENGTH))
    assert talk.prompt_tokens == 350 + 100 + 200
    assert talk.prefix_keys()[: len(keys)] == keys
    assert len(talk.prefix_keys()) > len(keys)
