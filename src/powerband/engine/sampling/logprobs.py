"""Log-probabilities of tokens under the model's own distribution: before masks, penalties and temperature, as vLLM's.

Whole rows of log-softmax exist for a few rows at a time only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from powerband.core.step import TokenLogprobs
from powerband.engine.sampling.logits import to_device
from powerband.engine.sampling.ops import in_blocks, largest, portions, whole_blocks

_POSITIONS_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class LogprobTensors:
    """Per row: the actual token, then the `k` likeliest. On the device, until `packed` has come to the host."""

    token_ids: Tensor  # int64 [rows, 1 + k]
    logprobs: Tensor  # float32 [rows, 1 + k]
    ranks: Tensor  # int64 [rows]

    def packed(self) -> Tensor:
        """All of it as int64 [rows, 2 * (1 + k) + 1], to travel in one piece."""
        return torch.cat([self.token_ids, self.logprobs.double().view(torch.int64), self.ranks.unsqueeze(1)], 1)


def token_logprobs(logits: Tensor, token_ids: Tensor, num_alternatives: int) -> LogprobTensors:
    """Log-probabilities of `token_ids` [rows] and of the likeliest tokens; logits [rows, vocab] of any float type."""
    parts = [
        _some_logprobs(logits[rows[0] : rows[-1] + 1], token_ids[rows[0] : rows[-1] + 1], num_alternatives)
        for rows in portions(range(len(logits)), logits)
    ]
    return LogprobTensors(
        torch.cat([part.token_ids for part in parts]),
        torch.cat([part.logprobs for part in parts]),
        torch.cat([part.ranks for part in parts]),
    )


def unpacked(packed: Tensor) -> list[TokenLogprobs]:
    """The rows of `LogprobTensors.packed`, on the host."""
    width = (packed.shape[1] - 1) // 2
    ids = packed[:, :width].tolist()
    logprobs = packed[:, width : 2 * width].contiguous().view(torch.float64).tolist()
    return [
        TokenLogprobs(row_ids, row_logprobs, rank)
        for row_ids, row_logprobs, rank in zip(ids, logprobs, packed[:, -1].tolist(), strict=True)
    ]


def prompt_logprobs(
    hidden: Tensor, head: Callable[[Tensor], Tensor], token_ids: Sequence[int], num_alternatives: int
) -> list[TokenLogprobs]:
    """Rows for prompt tokens: hidden[i] (of [positions, hidden_size]) predicts token_ids[i]; there may be more states.

    `head` turns hidden states into logits. It is called for 64 positions at a time, so a long prompt does not need
    [positions, vocab] of memory. Waits for the device.
    """
    rows: list[TokenLogprobs] = []
    for start in range(0, len(token_ids), _POSITIONS_AT_ONCE):
        some = token_ids[start : start + _POSITIONS_AT_ONCE]
        logits = head(hidden[start : start + len(some)])
        actual = to_device(some, torch.int64, logits.device)
        rows += unpacked(token_logprobs(logits, actual, num_alternatives).packed().cpu())
    return rows


def _some_logprobs(logits: Tensor, token_ids: Tensor, num_alternatives: int) -> LogprobTensors:
    values = whole_blocks(logits)
    logprobs = torch.log_softmax(values, 1)
    own_ids = token_ids.unsqueeze(1)
    own = logprobs.gather(1, own_ids)
    likelier = in_blocks(torch.gt(values, values.gather(1, own_ids), out=torch.empty_like(logprobs))).sum(2).sum(1)
    top, top_ids = largest(logprobs, min(num_alternatives, logits.shape[1]))
    return LogprobTensors(torch.cat([own_ids, top_ids], 1), torch.cat([own, top], 1), likelier.to(torch.int64) + 1)
