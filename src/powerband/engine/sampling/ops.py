"""Choosing tokens from logits: exact and, on a CPU, without sorting a vocabulary.

A row of the vocabulary is looked at in blocks of 64 tokens. A pass that reduces each block costs less than a tenth of a
sort, and what remains is small. Every choice depends on its own row only, to the last bit: probabilities are rounded to
multiples of 2^-40, so that their sums in float64 are exact and the order of additions, which differs with the number of
rows, does not matter.

"Kept" below means: not less than a threshold, so tokens that tie are kept together. The functions that draw use their
logits [rows, whole blocks] and `spare`, of the same shape, as working memory: both are overwritten. (Fresh memory of
this size costs more in page faults than the arithmetic does.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64
MAX_SMALL_K = 64
_CANDIDATE_BLOCKS = 96  # the 64 most likely tokens lie in the 64 blocks with the largest maxima; the others hold ties
_GRID = 2.0**-17  # adding it to a float32 in [0, 1] and taking it off again leaves a multiple of 2^-40

_ROWS_AT_ONCE = 64
_ELEMENTS_AT_ONCE = {True: 2**20, False: 2**22}  # logits: on a CPU, elsewhere

Uniforms = Callable[[int], Tensor]  # the n-th draw: float64 [rows] in [0, 1)
T = TypeVar("T")


def portions(rows: Sequence[T], logits: Tensor) -> Iterator[Sequence[T]]:
    """`rows` in portions whose working memory is bounded, and on a CPU stays in its caches."""
    fitting = _ELEMENTS_AT_ONCE[logits.device.type == "cpu"] // logits.shape[1]
    count = max(1, min(fitting, _ROWS_AT_ONCE))
    for start in range(0, len(rows), count):
        yield rows[start : start + count]


def padded_width(vocab_size: int) -> int:
    """The vocabulary in whole blocks."""
    return -(-vocab_size // BLOCK) * BLOCK


def whole_blocks(logits: Tensor) -> Tensor:
    """[rows, vocab] as float32 [rows, whole blocks], -inf beyond the vocabulary; the same memory where it is that."""
    padding = padded_width(logits.shape[1]) - logits.shape[1]
    values = logits.float()
    return F.pad(values, (0, padding), value=-math.inf) if padding else values


def in_blocks(values: Tensor) -> Tensor:
    """[rows, whole blocks] as [rows, blocks, 64]."""
    return torch.unflatten(values, 1, (-1, BLOCK))


def argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit's token (the lowest of equal ones) and its value, per row of float32 [rows, vocab]."""
    vocab_size = logits.shape[1]
    whole = vocab_size - vocab_size % BLOCK
    maxima = in_blocks(logits[:, :whole]).amax(2)
    if whole < vocab_size:
        maxima = torch.cat([maxima, logits[:, whole:].amax(1, keepdim=True)], 1)
    first = maxima.argmax(1, keepdim=True) * BLOCK
    ids = (first + torch.arange(BLOCK, device=logits.device)).clamp_(max=vocab_size - 1)
    token_ids = ids.gather(1, logits.gather(1, ids).argmax(1, keepdim=True))
    return token_ids.squeeze(1), logits.gather(1, token_ids).squeeze(1)


def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` (at most 64) largest values and their columns, descending, of [rows, whole blocks]."""
    blocks = in_blocks(values)
    chosen = blocks.amax(2).topk(min(count, blocks.shape[1]), sorted=False).indices
    candidates = _take(blocks, chosen).flatten(1)
    top, where = candidates.topk(count)
    return top, chosen.gather(1, where // BLOCK) * BLOCK + where % BLOCK


def draw(logits: Tensor, spare: Tensor, min_p: Tensor | None, uniforms: Uniforms) -> Tensor:
    """A token kept by min_p: with at least that share of the largest probability. None: any token."""
    blocks = in_blocks(_probabilities(logits, spare, min_p))
    return _pick(blocks, _block_sums(blocks), uniforms(0))


def draw_top_k(logits: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniforms: Uniforms) -> Tensor:
    """A token kept by min_p, then top_k (1 to 64), then top_p over what these two keep.

    Tokens tied with the k-th are kept, as far as they lie in the 96 blocks with the largest maxima.
    """
    blocks = in_blocks(logits)
    chosen = blocks.amax(2).topk(min(_CANDIDATE_BLOCKS, blocks.shape[1]), sorted=False).indices
    chosen = chosen.sort(1).values  # so that the draw is by token, as everywhere
    candidates = _take(blocks, chosen)
    flat = candidates.flatten(1)
    top = flat.topk(min(MAX_SMALL_K, flat.shape[1])).values
    last = (top_k - 1).clamp(max=top.shape[1] - 1).unsqueeze(1)
    least = torch.maximum(top.gather(1, last), top[:, :1] + min_p.log().unsqueeze(1))
    weights = _to_grid(torch.exp(flat - top[:, :1])) * (flat >= least)
    top_weights = _to_grid(torch.exp(top - top[:, :1])) * (top >= least)
    nucleus = _least_in_nucleus(top_weights, top_p * weights.double().sum(1))
    kept = in_blocks(weights * (weights >= nucleus))
    where = _pick(kept, _block_sums(kept), uniforms(0))
    return chosen.gather(1, (where // BLOCK).unsqueeze(1)).squeeze(1) * BLOCK + where % BLOCK


def draw_nucleus(logits: Tensor, spare: Tensor, top_p: Tensor, min_p: Tensor | None, uniforms: Uniforms) -> Tensor:
    """A token kept by min_p, then top_p over what that keeps, by rejection.

    A token belongs to the nucleus when the mass of all likelier tokens is below top_p. So: draw from all, and draw
    again among the likelier ones while that fails. What is accepted is distributed as in the nucleus, after about
    1 / top_p rounds, each one pass over the rows that are left. Waits for the device in every round.
    """
    weights, memory = _probabilities(logits, spare, min_p), logits
    sums = _block_sums(in_blocks(weights))
    wanted = top_p * sums.sum(1)
    token_ids = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    rows = torch.arange(len(logits), device=logits.device)
    number = 0
    while True:
        drawn = token_ids[rows] = _pick(in_blocks(weights), sums, uniforms(number)[rows])
        likelier = torch.gt(weights, weights.gather(1, drawn.unsqueeze(1)), out=memory[: len(rows)])
        sums = _block_sums(in_blocks(likelier.mul_(weights)))
        rejected = sums.sum(1) >= wanted[rows]  # false for rows that are not numbers
        if not rejected.any():
            return token_ids
        rows, sums = rows[rejected], sums[rejected]
        weights, memory = _rows_into(memory=weights, values=likelier, chosen=rejected), likelier
        number += 1


def draw_sorted(
    logits: Tensor,
    spare: Tensor,
    num_sorted: int,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor | None,
    uniforms: Uniforms,
) -> Tensor:
    """A token kept by min_p, top_k (at most `num_sorted`) and top_p, by sorting the likeliest `num_sorted` of each row.

    Never waits for the device. Without top_k, num_sorted is the width of the rows, and top_k too.
    """
    weights = _probabilities(logits, spare, min_p)
    descending = weights.topk(num_sorted).values
    least = descending.gather(1, top_k.unsqueeze(1) - 1)
    weights.mul_(torch.ge(weights, least, out=logits))
    descending.mul_(descending >= least)
    total = _block_sums(in_blocks(weights)).sum(1)
    weights.mul_(torch.ge(weights, _least_in_nucleus(descending, top_p * total), out=logits))
    kept = in_blocks(weights)
    return _pick(kept, _block_sums(kept), uniforms(0))


def _probabilities(logits: Tensor, spare: Tensor, min_p: Tensor | None) -> Tensor:
    """softmax in float32 on the grid, in the memory of `spare`; 0 where it is below min_p times the row's largest."""
    weights = torch.softmax(logits, 1, out=spare)
    if min_p is not None:
        least = min_p.unsqueeze(1) * weights.amax(1, keepdim=True)
        weights.mul_(torch.ge(weights, least.float(), out=logits))
    return _to_grid(weights)


def _rows_into(memory: Tensor, values: Tensor, chosen: Tensor) -> Tensor:
    """The chosen rows of `values`, in other memory."""
    indices = chosen.nonzero().squeeze(1)
    return torch.index_select(values, 0, indices, out=memory[: len(indices)])


def _to_grid(weights: Tensor) -> Tensor:
    return weights.add_(_GRID).sub_(_GRID)


def _least_in_nucleus(descending: Tensor, wanted: Tensor) -> Tensor:
    """The least weight [rows, 1] such that all greater ones together stay below `wanted` [rows]."""
    exact = descending.double()
    greater = exact.cumsum(1) - exact
    return descending.masked_fill(greater >= wanted.unsqueeze(1), math.inf).amin(1, keepdim=True)


def _block_sums(blocks: Tensor) -> Tensor:
    """Sums over the last dimension, as multiples of 2^-40 in float64.

    A GPU adds up in an order that depends on the shape, so there it has to be exact. A CPU adds a block always in the
    same order, and float32, rounded once more, is 20 times faster.
    """
    if blocks.device.type == "cpu":
        return blocks.sum(-1).double()
    return blocks.sum(-1, dtype=torch.float64)


def _pick(blocks: Tensor, sums: Tensor, uniforms: Tensor) -> Tensor:
    """The column [rows] at which the cumulated weights [rows, blocks, 64] pass uniform x total (inverse CDF).

    sums: those of the blocks.
    """
    cumulated = sums.cumsum(1)
    target = uniforms.unsqueeze(1) * cumulated[:, -1:]
    block = torch.searchsorted(cumulated, target, right=True).clamp_(max=blocks.shape[1] - 1)
    before = F.pad(cumulated, (1, 0)).gather(1, block)
    inner = _take(blocks, block).squeeze(1).double().cumsum(1)
    # Where the sum of a block was rounded up, the target can lie beyond it: then it is the last token with weight.
    last = torch.searchsorted(inner, inner[:, -1:].contiguous())
    column = torch.minimum(torch.searchsorted(inner, target - before, right=True), last).clamp_(max=BLOCK - 1)
    return (block * BLOCK + column).squeeze(1)


def _take(blocks: Tensor, indices: Tensor) -> Tensor:
    """blocks [rows, blocks, 64] at `indices` [rows, n]: [rows, n, 64]."""
    return blocks.gather(1, indices.unsqueeze(2).expand(-1, -1, BLOCK))
