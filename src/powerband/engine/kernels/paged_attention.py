"""Triton kernels for attention over a paged KV cache: chunks of queries, single queries with split KV, combination.

    cache of a layer: keys and values [num_blocks, num_kv_heads, block_size, head_dim]

One program holds the queries of all heads that share a KV head, so that every key is read once for all of them:

    chunk:   rows of a tile = (query 0: head 0 … head g-1), (query 1: head 0 … head g-1), …
    decode:  rows of a tile = head 0 … head g-1, padded to 16; the context is cut into `splits` runs of positions,
             each its own program, and a second kernel weighs the runs' results by their sums of exponentials

The softmax is the online one of FlashAttention-2 (Dao 2023, arXiv 2307.08691) in base 2; splitting the context follows
Flash-Decoding (Dao et al. 2023). Nothing here is specific to one vendor. `UPCAST` computes in float32 throughout:
for float32 inputs, and under Triton's interpreter, whose bfloat16 arithmetic is wrong.

Numbers that change from step to step are not specialised on: each kernel compiles a handful of times, not per step.
"""

# mypy: ignore-errors
# (Triton's language looks like Python, but its pointers and tensors have no Python types.)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load_keys(cache, tables, positions, first, end, kv_head, stride_block, stride_head, BLOCK_SIZE: tl.constexpr,
               HEAD_DIM: tl.constexpr, PAD_DIM: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """[positions, PAD_DIM] of a cache through a block table; zero outside [first, end) and where a dimension is not.

    Before a window the table's blocks may be another request's, whose numbers must not be read.
    """
    exists = (positions >= first) & (positions < end)
    block = tl.load(tables + positions // BLOCK_SIZE, mask=exists, other=0).to(tl.int64)
    slot = block * stride_block + kv_head * stride_head + (positions % BLOCK_SIZE) * HEAD_DIM
    dims = tl.arange(0, PAD_DIM)
    tile = tl.load(cache + slot[:, None] + dims[None, :], mask=exists[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _scores(q, k, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Logits in base 2. With a cap, `scale` includes 1/cap and `softcap` includes log2(e); without, `scale` does."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if HAS_SOFTCAP:
        # tanh by exponentials: exact limits at both ends, and the same on every vendor.
        scores = softcap * (1.0 - 2.0 / (tl.exp2(scores * 2.8853900817779268) + 1.0))
    return scores


@triton.jit
def _accumulate(scores, v, highest, total, acc):
    """One step of the online softmax: rescale what is there to the new maximum, add the tile."""
    new_highest = tl.maximum(highest, tl.max(scores, axis=1))
    # A row that has seen nothing yet keeps -inf as its maximum; subtracting zero instead avoids NaN.
    base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(highest - base)
    total = total * shrink + tl.sum(weights, axis=1)
    acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    return new_highest, total, acc


@triton.jit
def _start(sinks, head, exists, TILE_M: tl.constexpr, HAS_SINKS: tl.constexpr):
    """Maximum and sum before the first key. A sink is a key with a logit and no value."""
    if HAS_SINKS:
        highest = tl.load(sinks + head, mask=exists, other=0.0).to(tl.float32) * 1.4426950408889634
        total = tl.full([TILE_M], 1.0, dtype=tl.float32)
    else:
        highest = tl.full([TILE_M], float("-inf"), dtype=tl.float32)
        total = tl.zeros([TILE_M], dtype=tl.float32)
    return highest, total


@triton.jit
def row_of(program, query_starts, first_token, num_rows, QUERIES: tl.constexpr):
    """The last row whose tiles begin at or before `program`, by bisection."""
    low, high = 0, num_rows
    while low < high:
        middle = (low + high) // 2
        if (tl.load(query_starts + middle) - first_token) // QUERIES + middle <= program:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit(
    do_not_specialize=["first_row", "num_rows", "stride_table"],
    do_not_specialize_on_alignment=["query_starts", "context_lens"],
)
def chunk_kernel(q, out, k_cache, v_cache, tables, query_starts, context_lens, sinks, first_row, num_rows, scale,
                 softcap, stride_q_token, stride_q_head, stride_out_token, stride_out_head, stride_table, stride_block,
                 stride_head, GROUP: tl.constexpr, QUERIES: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
                 BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, PAD_DIM: tl.constexpr, WINDOW: tl.constexpr,
                 HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """QUERIES consecutive queries of one request, all heads of one KV head. Grid: (tiles over all requests, kv heads).

    The chunks are `num_rows` rows of the batch from `first_row` on. The tiles of row r are programs
    query_starts[r] // QUERIES + r onwards, so a search over rows finds a program's row without a map from the host.
    """
    program, kv_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    query_starts += first_row
    first_token = tl.load(query_starts)
    row = row_of(program, query_starts, first_token, num_rows, QUERIES)
    row_start = tl.load(query_starts + row)
    num_queries = tl.load(query_starts + row + 1) - row_start
    first_query = (program - (row_start - first_token) // QUERIES - row) * QUERIES
    if first_query >= num_queries:
        return
    context = tl.load(context_lens + first_row + row)
    before = context - num_queries

    lines = tl.arange(0, TILE_M)
    dims = tl.arange(0, PAD_DIM)
    query = first_query + lines // GROUP
    head = kv_head * GROUP + lines % GROUP
    exists = (lines < QUERIES * GROUP) & (query < num_queries)
    inside = exists[:, None] & (dims < HEAD_DIM)[None, :]
    token = (row_start + query).to(tl.int64)
    q_at = q + token[:, None] * stride_q_token + head[:, None] * stride_q_head + dims[None, :]
    queries = tl.load(q_at, mask=inside, other=0.0)
    if UPCAST:
        queries = queries.to(tl.float32)

    highest, total = _start(sinks, head, exists, TILE_M, HAS_SINKS)
    acc = tl.zeros([TILE_M, PAD_DIM], dtype=tl.float32)
    position = before + query
    end = before + tl.minimum(first_query + QUERIES, num_queries)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(before + first_query - WINDOW + 1, 0)
    begin = first // TILE_N * TILE_N
    table = tables + (first_row + row).to(tl.int64) * stride_table
    for start in range(begin, end, TILE_N):
        keys_at = start + tl.arange(0, TILE_N)
        k = _load_keys(k_cache, table, keys_at, first, end, kv_head, stride_block, stride_head, BLOCK_SIZE, HEAD_DIM,
                       PAD_DIM, UPCAST)  # fmt: skip
        visible = keys_at[None, :] <= position[:, None]
        if WINDOW > 0:
            visible &= keys_at[None, :] > position[:, None] - WINDOW
        scores = tl.where(visible, _scores(queries, k, scale, softcap, HAS_SOFTCAP), float("-inf"))
        v = _load_keys(v_cache, table, keys_at, first, end, kv_head, stride_block, stride_head, BLOCK_SIZE, HEAD_DIM,
                       PAD_DIM, UPCAST)  # fmt: skip
        highest, total, acc = _accumulate(scores, v, highest, total, acc)
    out_at = out + token[:, None] * stride_out_token + head[:, None] * stride_out_head + dims[None, :]
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["splits", "stride_table"], do_not_specialize_on_alignment=["context_lens"])
def decode_kernel(q, out, partial, partial_lse, k_cache, v_cache, tables, context_lens, sinks, scale, softcap,
                  stride_q_token, stride_q_head, stride_out_token, stride_out_head, stride_table, stride_block,
                  stride_head, num_heads, splits, GROUP: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
                  SINGLE: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, PAD_DIM: tl.constexpr,
                  WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
                  UPCAST: tl.constexpr):  # fmt: skip
    """One query over one run of its context, all heads of one KV head. Grid: (rows, kv heads, splits).

    SINGLE: there is one run, and its result is final. A row without context (padding of a captured graph) gives zeros.
    """
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    context = tl.load(context_lens + row)
    lines = tl.arange(0, TILE_M)
    dims = tl.arange(0, PAD_DIM)
    head = kv_head * GROUP + lines
    exists = lines < GROUP
    inside = exists[:, None] & (dims < HEAD_DIM)[None, :]
    q_at = q + row * stride_q_token + head[:, None] * stride_q_head + dims[None, :]
    queries = tl.load(q_at, mask=inside, other=0.0)
    if UPCAST:
        queries = queries.to(tl.float32)

    highest, total = _start(sinks, head, exists, TILE_M, HAS_SINKS and SINGLE)
    acc = tl.zeros([TILE_M, PAD_DIM], dtype=tl.float32)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(context - WINDOW, 0)
    begin = first // TILE_N * TILE_N
    run = tl.cdiv(tl.cdiv(context - begin, TILE_N), splits) * TILE_N
    begin += split * run
    end = tl.minimum(begin + run, context)
    table = tables + row * stride_table
    for start in range(begin, end, TILE_N):
        keys_at = start + tl.arange(0, TILE_N)
        k = _load_keys(k_cache, table, keys_at, first, end, kv_head, stride_block, stride_head, BLOCK_SIZE, HEAD_DIM,
                       PAD_DIM, UPCAST)  # fmt: skip
        visible = (keys_at >= first) & (keys_at < end)
        scores = tl.where(visible[None, :], _scores(queries, k, scale, softcap, HAS_SOFTCAP), float("-inf"))
        v = _load_keys(v_cache, table, keys_at, first, end, kv_head, stride_block, stride_head, BLOCK_SIZE, HEAD_DIM,
                       PAD_DIM, UPCAST)  # fmt: skip
        highest, total, acc = _accumulate(scores, v, highest, total, acc)

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    if SINGLE:
        out_at = out + row * stride_out_token + head[:, None] * stride_out_head + dims[None, :]
        tl.store(out_at, acc.to(out.dtype.element_ty), mask=inside)
    else:
        at = (row * num_heads + head) * splits + split
        tl.store(partial + at[:, None] * HEAD_DIM + dims[None, :], acc, mask=inside)
        tl.store(partial_lse + at, tl.where(total == 0.0, float("-inf"), highest + tl.log2(total)), mask=exists)


@triton.jit(do_not_specialize=["splits"])
def combine_kernel(partial, partial_lse, out, sinks, stride_out_token, stride_out_head, splits,
                   MAX_SPLITS: tl.constexpr, HEAD_DIM: tl.constexpr, PAD_DIM: tl.constexpr,
                   HAS_SINKS: tl.constexpr):  # fmt: skip
    """Weigh the runs of one query and head by 2^(log-sum-exp). Grid: (rows, heads)."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    split = tl.arange(0, MAX_SPLITS)
    dims = tl.arange(0, PAD_DIM)
    at = (row * tl.num_programs(1) + head) * splits + split
    lse = tl.load(partial_lse + at, mask=split < splits, other=float("-inf"))
    highest = tl.max(lse, axis=0)
    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        highest = tl.maximum(highest, sink)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2(lse - base)
    total = tl.sum(weights, axis=0)
    if HAS_SINKS:
        total += tl.exp2(sink - base)
    # A run without positions left its result unwritten: it must not be read, since 0 * NaN is NaN.
    inside = (lse > float("-inf"))[:, None] & (dims < HEAD_DIM)[None, :]
    parts = tl.load(partial + at[:, None] * HEAD_DIM + dims[None, :], mask=inside, other=0.0)
    result = tl.sum(parts * weights[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    out_at = out + row * stride_out_token + head * stride_out_head + dims
    tl.store(out_at, result.to(out.dtype.element_ty), mask=dims < HEAD_DIM)
