"""Sampling by C++ kernels: edits, choice and log-probabilities of rows of logits, each row by itself.

They choose what ops.py and logits.py define, with the same uniform numbers. But weights are not divided by their
sum, and e^x is not rounded as torch's: cumulated weights differ from the reference's by some 1e-8 of the total, and so
does a token where the uniform number falls between the two (none did in 4,000 draws from 20,000 tokens). All tokens
that tie with the k-th are kept; the reference looks for them in 96 blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from powerband.engine.sampling.logits import SamplingState
from powerband.engine.sampling.sampler import Sampler


def use_cpu_sampling(sampler: Sampler) -> None:
    """Let kernels do the sampler's work. Needs `library.load().tier`."""
    sampler.kernels = CpuSampling()


class CpuSampling:
    def sample(
        self, logits: Tensor, states: Sequence[SamplingState], positions: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Token ids [rows] and largest logits (edited) [rows] of logits [rows, vocab], which stay as they are."""
        params, numbers = [], []
        for state, position in zip(states, positions, strict=True):
            p = state.params
            params.append((0.0 if p.is_greedy else p.temperature, p.top_p, p.min_p))
            numbers.append((state.seed - (state.seed >> 63 << 64), position, max(p.top_k, 0)))
        edits = _edits(states, positions) if any(state.edits_logits for state in states) else (None,) * 5
        choices = torch.tensor(params, dtype=torch.float64), torch.tensor(numbers, dtype=torch.int64)
        out: tuple[Tensor, Tensor] = torch.ops.powerband.sample(
            _readable(logits), *(rows.view(-1, 3) for rows in choices), *edits
        )
        return out

    def logprobs(self, logits: Tensor, token_ids: Tensor, num_alternatives: int) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids and log-probabilities [rows, 1 + alternatives] and ranks [rows], as `logprobs.token_logprobs`."""
        out: tuple[Tensor, Tensor, Tensor] = torch.ops.powerband.logprobs(
            _readable(logits), token_ids.contiguous(), min(num_alternatives, logits.shape[1])
        )
        return out


def _readable(logits: Tensor) -> Tensor:
    return (logits if logits.dtype in (torch.bfloat16, torch.float32) else logits.float()).contiguous()


def _edits(states: Sequence[SamplingState], positions: Sequence[int]) -> tuple[Tensor, ...]:
    """Penalties, offsets, tokens, biases and masks of rows, as csrc/sampling_edits.h lays them out."""
    tokens: list[Tensor] = []
    biases: list[Tensor] = []
    penalties, offsets, end = [], [], 0
    masks: list[Tensor] = []
    places: dict[int, int] = {}  # where the allowed tokens of several rows begin, by their tensor

    def put(ids: Tensor, values: Tensor | None = None) -> int:
        nonlocal end
        tokens.append(ids)
        biases.append(torch.zeros(len(ids)) if values is None else values)
        begin, end = end, end + len(ids)
        return begin

    for state, position in zip(states, positions, strict=True):
        p = state.params
        penalties.append((p.repetition_penalty, p.presence_penalty, p.frequency_penalty))
        ends = [0] * 4
        if (allowed := state.allowed) is not None:
            if id(allowed) not in places:
                places[id(allowed)] = put(allowed)
            ends[:2] = places[id(allowed)], places[id(allowed)] + len(allowed)
        ends[2] = end
        for biased, values in state.added_biases(position) if state.edits_logits else ():
            put(biased, values)
        ends[3] = end
        known = put(state.tokens(0, position)) if state.is_penalized else end
        if state.mask is not None:
            masks.append(state.mask)
        mask_row = len(masks) - 1 if state.mask is not None else -1
        offsets.append((*ends, known, min(known + state.num_prompt_tokens, end), end, mask_row))
    nothing = torch.zeros(0, dtype=torch.int64)
    return (
        torch.tensor(penalties, dtype=torch.float32),
        torch.tensor(offsets, dtype=torch.int64),
        torch.cat([nothing, *tokens]),
        torch.cat([nothing.float(), *biases]),
        torch.stack(masks) if masks else nothing.int().view(0, 0),
    )
