"""Pools the hidden states of prompts, also of prompts that are computed over several steps.

    step k      | hidden states of positions 0 … 511 |     the sum so far (mean), the first (cls), or nothing (last)
    step k + 1  | 512 … 700 |                              the vector: pooled, projected, cut, normalised

Vectors are computed in float32, whatever the model's type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from powerband.core.params import PoolingParams
from powerband.spec.model.pooling import Activation, PoolingSpec

Norm = Callable[[torch.Tensor], torch.Tensor]


@dataclass(slots=True)
class PoolingState:
    """What is kept of one prompt between its steps: the sum of its hidden states, or the first of them."""

    params: PoolingParams
    kept: torch.Tensor | None = None  # float32 [hidden]


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """The part of one prompt that a step has computed: rows [start, end) of the step's hidden states."""

    state: PoolingState
    start: int
    end: int
    num_positions: int  # of the prompt, up to the end of this chunk
    is_first: bool
    is_last: bool


@dataclass(frozen=True, slots=True)
class DenseLayer:
    weight: torch.Tensor  # float32 [out, in]
    bias: torch.Tensor | None
    activation: Activation


class Pooler:
    """Makes vectors as a PoolingSpec says. `layers`: its projections, in order; of a classifier, with its head."""

    def __init__(self, spec: PoolingSpec, layers: Sequence[DenseLayer] = ()) -> None:
        self.spec = spec
        self._layers = list(layers)

    def pool(self, hidden: torch.Tensor, norm: Norm, chunks: Sequence[PromptChunk]) -> list[torch.Tensor]:
        """The vectors (float32) of the chunks that are the last of their prompts, in order.

        hidden: of all rows of the step [tokens, hidden], before the last norm. What is kept for the next step is stored
        when nothing can fail any more, so that a step may be tried again.
        """
        pooled = self._pooled(hidden, norm, chunks)
        last = [index for index, chunk in enumerate(chunks) if chunk.is_last]
        vectors = self._project(torch.stack([pooled[index] for index in last])) if last else None
        done = [] if vectors is None else [self._cut(vectors[i], chunks[k].state.params) for i, k in enumerate(last)]
        for index, chunk in enumerate(chunks):
            chunk.state.kept = None if chunk.is_last else pooled.get(index)
        return done

    def _pooled(self, hidden: torch.Tensor, norm: Norm, chunks: Sequence[PromptChunk]) -> dict[int, torch.Tensor]:
        """By index, the pooled vector of a prompt that is complete; of others, what is to be kept so far."""
        if self.spec.mode == "mean":
            normed = norm(hidden)
            return {index: _mean(normed, chunk) for index, chunk in enumerate(chunks)}
        if self.spec.mode == "cls":
            rows = {index: chunk.start for index, chunk in enumerate(chunks) if chunk.is_first}
        else:
            rows = {index: chunk.end - 1 for index, chunk in enumerate(chunks) if chunk.is_last}
        kept = {i: chunk.state.kept for i, chunk in enumerate(chunks) if not chunk.is_first}
        found = {index: vector for index, vector in kept.items() if vector is not None}
        if rows:
            chosen = norm(hidden[torch.tensor(list(rows.values()), device=hidden.device)]).to(torch.float32, copy=True)
            found |= dict(zip(rows, chosen, strict=True))
        return found

    def _project(self, vectors: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] → [rows, dimension]."""
        for layer in self._layers:
            vectors = activate(F.linear(vectors, layer.weight, layer.bias), layer.activation)
        return vectors

    def _cut(self, vector: torch.Tensor, params: PoolingParams) -> torch.Tensor:
        """The first `dimensions`, then of length 1; or the activation of a classifier."""
        wanted = params.use_activation
        if self.spec.task == "classify":
            return activate(vector, self.spec.activation) if wanted is not False else vector
        if params.dimensions is not None:
            vector = vector[: params.dimensions]
        return F.normalize(vector, dim=-1) if (self.spec.normalize if wanted is None else wanted) else vector


def _mean(normed: torch.Tensor, chunk: PromptChunk) -> torch.Tensor:
    """The mean of a prompt that is complete; of others the sum so far."""
    total = normed[chunk.start : chunk.end].sum(0, dtype=torch.float32)
    if not chunk.is_first and chunk.state.kept is not None:
        total += chunk.state.kept
    return total / chunk.num_positions if chunk.is_last else total


def activate(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    match activation:
        case "identity":
            return x
        case "tanh":
            return torch.tanh(x)
        case "relu":
            return F.relu(x)
        case "gelu":
            return F.gelu(x)
        case "sigmoid":
            return torch.sigmoid(x)
        case "softmax":
            return torch.softmax(x, dim=-1)
