"""Run a decoder once in each way that compiles something, so that the first requests do not wait for a compiler.

Everything that runs here is padding: slots are -1, so no backend that compiles kernels writes to its KV cache.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from powerband.engine.attention.base import AttentionBatch
from powerband.engine.executor.batch import Inputs

# Attention has a variant for short and one for long chunks, experts have one for few and one for many tokens.
_CHUNKS = (8, 128, 1024)


@torch.inference_mode()
def warm_up(
    forward: Callable[[Inputs], torch.Tensor],
    *,
    max_model_len: int,
    block_size: int,
    device: torch.device,
    groups: int = 1,
) -> None:
    """Chunks short and long, and a decode whose context is short, then one whose context is split.

    groups: of layers with block tables of their own.
    """
    for num_tokens in _CHUNKS:
        if num_tokens <= max_model_len:
            forward(_padding(num_tokens, num_tokens, block_size, device, groups))
    for context in (1, max_model_len):
        forward(_padding(1, context, block_size, device, groups))


def _padding(num_tokens: int, context: int, block_size: int, device: torch.device, groups: int) -> Inputs:
    def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    batch = AttentionBatch(
        query_starts=torch.tensor([0, num_tokens], dtype=torch.int32, device=device),
        context_lens=torch.tensor([num_tokens], dtype=torch.int32, device=device),
        block_tables=zeros(1, -(-context // block_size), dtype=torch.int32),
        slots=zeros(num_tokens, dtype=torch.int64).fill_(-1),
        num_decodes=int(num_tokens == 1),
        query_starts_host=[0, num_tokens],
        context_lens_host=[context],
    )
    batch.others = (batch,) * (groups - 1)
    return Inputs(zeros(num_tokens, dtype=torch.int64), zeros(num_tokens, dtype=torch.int64), batch)
