"""Triton kernel between projections and attention: norm of each head, rotation of q and k, K and V into their blocks.

One pass over a token's q, k and v in place of six: what would be read and written several times is touched once.
Everything is computed in float32 and rounded once.
"""

# mypy: ignore-errors
# (Triton's language looks like Python, but its pointers and tensors have no Python types.)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _heads(source, head, exists, cos, sin, weights, eps, HEAD_DIM: tl.constexpr, PAD_DIM: tl.constexpr,
           ROTARY_DIM: tl.constexpr, HAS_NORM: tl.constexpr):  # fmt: skip
    """[heads, PAD_DIM] in float32: normalised, then rotated. The pair of dimension d is half a rotation away."""
    dims = tl.arange(0, PAD_DIM)
    at = head[:, None] * HEAD_DIM
    inside = exists[:, None] & (dims < HEAD_DIM)[None, :]
    x = tl.load(source + at + dims[None, :], mask=inside, other=0.0).to(tl.float32)
    if HAS_NORM:
        inverse_rms = tl.rsqrt(tl.sum(x * x, axis=1) / HEAD_DIM + eps)[:, None]
        x = x * inverse_rms * tl.load(weights + at + dims[None, :], mask=inside, other=0.0).to(tl.float32)
    if ROTARY_DIM > 0:
        half: tl.constexpr = ROTARY_DIM // 2
        rotates = dims < ROTARY_DIM
        pair = tl.where(dims < half, dims + half, dims - half)
        paired = exists[:, None] & rotates[None, :]
        y = tl.load(source + at + pair[None, :], mask=paired, other=0.0).to(tl.float32)
        if HAS_NORM:
            y = y * inverse_rms * tl.load(weights + at + pair[None, :], mask=paired, other=0.0).to(tl.float32)
        c = tl.load(cos + dims, mask=rotates, other=1.0).to(tl.float32)
        s = tl.load(sin + dims, mask=rotates, other=0.0).to(tl.float32)
        x = x * c[None, :] + y * s[None, :]
    return x


@triton.jit
def rotary_store_kernel(q, k, v, q_out, k_cache, v_cache, slots, cos, sin, weights, eps, stride_q_token,
                        stride_k_token, stride_v_token, stride_out_token, stride_block, stride_head, NUM_HEADS:
                        tl.constexpr, NUM_KV_HEADS: tl.constexpr, TILE_Q: tl.constexpr, TILE_KV: tl.constexpr,
                        Q_TILES: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, PAD_DIM: tl.constexpr,
                        ROTARY_DIM: tl.constexpr, HAS_NORM: tl.constexpr):  # fmt: skip
    """One token's heads. Grid: (tokens, Q_TILES + 1): tiles of query heads to `q_out`, then K and V to the cache.

    cos, sin: [tokens, ROTARY_DIM], sin with the sign of the rotation. weights: [NUM_HEADS + NUM_KV_HEADS, HEAD_DIM].
    A token whose slot is negative (padding of a captured graph) leaves the cache alone.
    """
    token, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dims = tl.arange(0, PAD_DIM)
    cos += token * ROTARY_DIM
    sin += token * ROTARY_DIM
    if tile < Q_TILES:
        head = tile * TILE_Q + tl.arange(0, TILE_Q)
        exists = head < NUM_HEADS
        x = _heads(q + token * stride_q_token, head, exists, cos, sin, weights, eps, HEAD_DIM, PAD_DIM, ROTARY_DIM,
                   HAS_NORM)  # fmt: skip
        at = q_out + token * stride_out_token + head[:, None] * HEAD_DIM + dims[None, :]
        tl.store(at, x.to(q_out.dtype.element_ty), mask=exists[:, None] & (dims < HEAD_DIM)[None, :])
    else:
        slot = tl.load(slots + token)
        if slot >= 0:
            head = tl.arange(0, TILE_KV)
            exists = head < NUM_KV_HEADS
            inside = exists[:, None] & (dims < HEAD_DIM)[None, :]
            x = _heads(k + token * stride_k_token, head, exists, cos, sin, weights + NUM_HEADS * HEAD_DIM, eps,
                       HEAD_DIM, PAD_DIM, ROTARY_DIM, HAS_NORM)  # fmt: skip
            y = tl.load(v + token * stride_v_token + head[:, None] * HEAD_DIM + dims[None, :], mask=inside, other=0.0)
            block = slot // BLOCK_SIZE * stride_block + slot % BLOCK_SIZE * HEAD_DIM
            at = block + head[:, None] * stride_head + dims[None, :]
            tl.store(k_cache + at, x.to(k_cache.dtype.element_ty), mask=inside)
            tl.store(v_cache + at, y.to(v_cache.dtype.element_ty), mask=inside)
