"""Requests that are longer than a model's context, cut to fit it: one rule for plans, simulations and load tests.

An application whose prompt is too long for its model shortens the prompt, keeps the room for the answer, and keeps its
instructions; one whose conversation has grown too long begins it again. So:

    a request      its prompt is cut first, down to half of the context, then its output, until both fit
    its prompt     the request's own text (its last segment) is cut first, down to half of the prompt, then what is
                   shared, from its end: prompts that began alike still do
    a later turn   that does not fit with the conversation before it begins a new one, with the same shared beginning
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from powerband.errors import UsageError
from powerband.spec.workload.schedule import Chain, LengthCut, PlannedRequest, Segment

MIN_MODEL_LEN = 2  # a token of prompt and one of output


def fit_chains(chains: Iterable[Chain], max_model_len: int) -> tuple[list[Chain], LengthCut | None]:
    """The chains with no request longer than `max_model_len`, and what was cut; None: nothing was."""
    fitted, lengths = [], list[int]()
    for chain in chains:
        requests = tuple(_fit_conversations(chain.requests, max_model_len, lengths))
        fitted.append(chain if requests == chain.requests else replace(chain, requests=requests))
    return fitted, LengthCut(max_model_len, len(lengths), max(lengths)) if lengths else None


def refuse_cuts(cut: LengthCut | None, num_requests: int) -> None:
    """For --strict-lengths. Raises UsageError where requests had to be cut."""
    if cut is not None:
        raise UsageError(
            f"{cut.text(num_requests)}, the longest {cut.max_tokens:,}.",
            hint="Ask for shorter ones (--prompt-tokens, --output-tokens, --turns), or leave out --strict-lengths.",
            param="strict_lengths",
        )


def _fit_conversations(
    requests: Iterable[PlannedRequest], max_model_len: int, cut_lengths: list[int]
) -> Iterable[PlannedRequest]:
    """cut_lengths: grows by the length of each request that is too long."""
    shared: tuple[Segment, ...] = ()
    history = turn = 0
    for request in requests:
        if request.turn == 0:
            shared, history, turn = request.segments[:-1], 0, 0
        length = history + request.new_tokens + request.output_tokens
        if length > max_model_len:
            cut_lengths.append(length)
            if turn:
                request = replace(request, segments=(*shared, *request.segments))
                history = turn = 0
            request = _fit_request(request, max_model_len)
        yield request if request.turn == turn else replace(request, turn=turn)
        history += request.new_tokens + request.output_tokens
        turn += 1


def _fit_request(request: PlannedRequest, max_model_len: int) -> PlannedRequest:
    """One that stands alone, or begins a conversation."""
    prompt = min(request.new_tokens, max(max_model_len // 2, max_model_len - request.output_tokens))
    output = min(request.output_tokens, max_model_len - prompt)
    *shared, own = request.segments
    own_tokens = min(own.tokens, max(-(-prompt // 2), prompt - sum(segment.tokens for segment in shared)))
    kept: list[Segment] = []
    left = prompt - own_tokens
    for segment in shared:
        if left > 0:
            kept.append(_shortened(segment, left))
            left -= kept[-1].tokens
    return replace(request, segments=(*kept, _shortened(own, own_tokens)), output_tokens=output)


def _shortened(segment: Segment, tokens: int) -> Segment:
    """To at most so many tokens; recorded text loses its end."""
    if segment.tokens <= tokens:
        return segment
    text = segment.text[: max(len(segment.text) * tokens // segment.tokens, 1)] if segment.text else segment.text
    return replace(segment, tokens=tokens, text=text)
