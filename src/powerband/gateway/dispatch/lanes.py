"""Replicas that take prompts up to the same length, what waits for them, and how fast they are.

A fleet of equal replicas is one lane.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from powerband.gateway.dispatch.admission import Admission
from powerband.gateway.dispatch.member import Member
from powerband.gateway.dispatch.queue import FairQueue
from powerband.gateway.pool_options import PoolOptions
from powerband.gateway.request import GatewayRequest


class Lane:
    """`serving`: where its requests go: replicas of its own, or, while it has none, of the next one up."""

    def __init__(self, longest_prompt: float, options: PoolOptions) -> None:
        self.longest_prompt = longest_prompt
        self.queue = FairQueue()
        self.admission = Admission(options)
        self.serving: list[Member] = []

    def observe(self, now_s: float) -> None:
        """Something has changed: who waits, or who serves."""
        is_saturated = self.queue.requests > 0
        live = sum(len(member.stays) for member in self.serving) if is_saturated else 0
        self.admission.capacity.observe(now_s, is_saturated, len(self.serving), live)


def _longest(member: Member) -> float:
    return math.inf if member.address.longest_prompt is None else member.address.longest_prompt


def lane_of(request: GatewayRequest, lanes: Sequence[Lane]) -> Lane:
    """The tightest that takes the prompt. Its length is an estimate, so the widest takes what is too long for all."""
    for lane in lanes:
        if request.prompt_tokens <= lane.longest_prompt:
            return lane
    return lanes[-1]


def arrange(lanes: Sequence[Lane], members: Iterable[Member], options: PoolOptions) -> list[Lane]:
    """The lanes of these replicas, tightest first; what waits has moved along."""
    members = list(members)
    wanted = sorted({_longest(member) for member in members}) or [math.inf]
    if wanted != [lane.longest_prompt for lane in lanes]:
        known = {lane.longest_prompt: lane for lane in lanes}
        new = [known.get(longest) or Lane(longest, options) for longest in wanted]
        for lane in lanes:
            for ticket in tuple(lane.queue):
                if (target := lane_of(ticket.request, new)) is not lane:
                    lane.queue.remove(ticket)
                    target.queue.push(ticket)
        lanes = new
    serving: list[Member] = []
    for lane in reversed(lanes):
        own = [member for member in members if member.takes_new and _longest(member) == lane.longest_prompt]
        lane.serving = serving = own or serving
    return list(lanes)
