"""The decoder that every family is an instance of: what differs between them is in the ModelSpec."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from powerband.engine.attention.base import AttentionBackend, AttentionBatch, AttentionShape, HeadNorm
from powerband.engine.layers.embedding import Embedding
from powerband.engine.layers.experts import Experts
from powerband.engine.layers.mlp import GatedMLP
from powerband.engine.layers.norm import RMSNorm
from powerband.engine.layers.rotary import RotaryTable
from powerband.engine.linear.adapters import ActiveAdapters
from powerband.engine.linear.base import Linear, parameter
from powerband.spec.model.model_spec import LayerSpec, ModelSpec, RopeSpec

Rotation = tuple[torch.Tensor, torch.Tensor]


class RunLayers(Protocol):
    """All layers of a model, in place."""

    def __call__(
        self,
        hidden: torch.Tensor,
        rotations: dict[RopeSpec, Rotation],
        batch: AttentionBatch,
        attention: AttentionBackend,
    ) -> None: ...


class Decoder(nn.Module):
    """Embedding, layers, and a head that is run only for the rows that need it.

    max_positions: the longest sequence that will be served; rotary tables are made for it.
    """

    def __init__(self, spec: ModelSpec, *, max_positions: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = Embedding(
            spec.vocab_size, spec.hidden_size, scale=spec.embedding_scale, dtype=dtype, device=device
        )
        self.layers = nn.ModuleList(
            DecoderLayer(spec, layer, index, dtype, device) for index, layer in enumerate(spec.layers)
        )
        self.norm = _norm(spec, spec.hidden_size, dtype, device)
        self.head = Linear(spec.hidden_size, spec.vocab_size, bias=False, dtype=dtype, device=device)
        if spec.tie_embeddings:
            self.head.weight = self.embedding.weight
        ropes = {layer.rope for layer in spec.layers if layer.rope is not None}
        self.rotary = {rope: RotaryTable(rope, max_positions, dtype=dtype, device=device) for rope in ropes}
        self.run_layers: RunLayers | None = None  # a device may have all layers in one
        self.adapters = ActiveAdapters()  # of the step that runs

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        batch: AttentionBatch,
        attention: AttentionBackend,
        rope_lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """token_ids, positions, rope_lengths [tokens] → hidden states [tokens, hidden] before the last norm.

        rope_lengths: what `RotaryTable.at` takes, of models with a `length_rope`.
        """
        attention.begin(batch)
        rotations: dict[RopeSpec, Rotation] = {
            rope: table.at(positions, rope_lengths) for rope, table in self.rotary.items()
        }
        hidden: torch.Tensor = self.embedding(token_ids)
        if self.run_layers is not None and not self.adapters.need_projections:
            self.run_layers(hidden, rotations, batch, attention)
            return hidden
        for layer in self.layers:
            hidden = layer(hidden, rotations, batch, attention)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Chosen rows of `forward`'s result [rows, hidden] → [rows, vocab]."""
        logits: torch.Tensor = self.head(self.norm(hidden))
        if self.spec.logit_softcap is not None:
            logits = torch.tanh(logits / self.spec.logit_softcap) * self.spec.logit_softcap
        return logits

    def argmax(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Only the largest of each row's logits: token ids [rows] and values [rows]. None: the head cannot."""
        if self.spec.logit_softcap is not None:
            return None  # it makes equal what was nearly equal, and then the lowest token id counts
        return self.head.argmax(self.norm(hidden))


class DecoderLayer(nn.Module):
    """Attention, then MLP or experts, each with the norms that the family puts before and after it.

    pre:  x + f(norm(x))      post: x + norm(f(x))      both: x + norm(f(norm(x)))
    """

    def __init__(self, spec: ModelSpec, layer: LayerSpec, index: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        before, after = spec.norm_placement != "post", spec.norm_placement != "pre"
        size = spec.hidden_size
        self.attention = Attention(spec, layer, index, dtype, device)
        self.mlp: Experts | GatedMLP = (
            Experts(spec, layer.num_experts, dtype=dtype, device=device)
            if layer.num_experts
            else GatedMLP(size, spec.intermediate_size, spec.activation, bias=spec.mlp_bias, dtype=dtype, device=device)
        )
        self.attention_norm = _norm(spec, size, dtype, device) if before else None
        self.mlp_norm = _norm(spec, size, dtype, device) if before else None
        self.attention_post_norm = _norm(spec, size, dtype, device) if after else None
        self.mlp_post_norm = _norm(spec, size, dtype, device) if after else None

    def forward(
        self,
        hidden: torch.Tensor,
        rotations: dict[RopeSpec, Rotation],
        batch: AttentionBatch,
        attention: AttentionBackend,
    ) -> torch.Tensor:
        self.attend(hidden, rotations, batch, attention)
        self.transform(hidden)
        return hidden

    def attend(
        self,
        hidden: torch.Tensor,
        rotations: dict[RopeSpec, Rotation],
        batch: AttentionBatch,
        attention: AttentionBackend,
    ) -> None:
        """The first half: adds to hidden [tokens, hidden] what attention makes of it."""
        x: torch.Tensor = self.attention_norm(hidden) if self.attention_norm is not None else hidden
        x = self.attention.heads(x, rotations, batch, attention)
        if self.attention_post_norm is not None:
            hidden.add_(self.attention_post_norm(self.attention.output(x)))
        else:
            self.attention.output.add_to(hidden, x)

    def transform(self, hidden: torch.Tensor) -> None:
        """The second half: adds what the MLP or the experts make of it."""
        x: torch.Tensor = self.mlp_norm(hidden) if self.mlp_norm is not None else hidden
        if self.mlp_post_norm is not None:
            hidden.add_(self.mlp_post_norm(self.mlp(x)))
        else:
            self.mlp.add_to(hidden, x)


class Attention(nn.Module):
    """Projections, and norms over all heads together; per-head norms, rotation and the rest are the backend's.

    The layer applies the `output` projection to what `heads` returns.
    """

    def __init__(self, spec: ModelSpec, layer: LayerSpec, index: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.index = index
        self.rope = layer.rope
        self.eps = spec.norm_eps
        self.num_heads, self.num_kv_heads, self.head_dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        self.shape = AttentionShape(
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            spec.attention_scale or spec.head_dim**-0.5,
            layer.window,
            spec.attention_softcap,
        )
        q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.qkv = Linear(spec.hidden_size, q_size + 2 * kv_size, bias=spec.qkv_bias, dtype=dtype, device=device)
        self.output = Linear(q_size, spec.hidden_size, bias=spec.output_bias, dtype=dtype, device=device)
        self.sinks = parameter(spec.num_heads, dtype=dtype, device=device) if spec.attention_sinks else None
        self.q_norm = self.k_norm = self.head_norm = None
        if spec.qk_norm == "full":
            self.q_norm, self.k_norm = _norm(spec, q_size, dtype, device), _norm(spec, kv_size, dtype, device)
        elif spec.qk_norm == "head":
            # One row of weights per head: q and k are normalised in one go.
            heads = spec.num_heads + spec.num_kv_heads
            wide = torch.float32 if spec.norm_weight_offset else dtype
            self.head_norm = parameter(heads, spec.head_dim, dtype=wide, device=device)

    def heads(
        self,
        x: torch.Tensor,
        rotations: dict[RopeSpec, Rotation],
        batch: AttentionBatch,
        attention: AttentionBackend,
    ) -> torch.Tensor:
        """[tokens, hidden] → [tokens, num_heads * head_dim]."""
        tokens, heads, kv_heads = x.shape[0], self.num_heads, self.num_kv_heads
        qkv: torch.Tensor = self.qkv(x)
        if self.q_norm is not None and self.k_norm is not None:
            q_size, kv_size = heads * self.head_dim, kv_heads * self.head_dim
            q, k, v = torch.split(qkv, [q_size, kv_size, kv_size], dim=-1)
            qkv = torch.cat([self.q_norm(q), self.k_norm(k), v], dim=-1)
        qkv = qkv.view(tokens, heads + 2 * kv_heads, self.head_dim)
        norm = HeadNorm(self.head_norm, self.eps) if self.head_norm is not None else None
        rotation = rotations[self.rope] if self.rope is not None else None
        out = attention.attend_unrotated(self.index, qkv, rotation, norm, batch, self.shape, self.sinks)
        return out.reshape(tokens, heads * self.head_dim)


def _norm(spec: ModelSpec, size: int, dtype: torch.dtype, device: torch.device) -> RMSNorm:
    wide = spec.norm_weight_offset != 0.0 or spec.family == "gpt_oss"
    return RMSNorm(size, spec.norm_eps, dtype=dtype, device=device, float32_weight=wide)
