"""Triton kernel that puts a step's decodes where a captured graph reads them: one launch in place of a dozen copies."""

# mypy: ignore-errors
# (Triton's language looks like Python, but its pointers and tensors have no Python types.)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=["num_rows", "width", "stride_from"],
    do_not_specialize_on_alignment=["positions", "context_lens"],
)
def stage_decodes_kernel(token_ids, positions, slots, context_lens, tables, token_ids_to, positions_to, slots_to,
                         context_lens_to, tables_to, num_rows, width, stride_from, stride_to,
                         TILE: tl.constexpr):  # fmt: skip
    """One row. Grid: (rows of the graph,). Rows from num_rows on become padding: no context, slot -1."""
    row = tl.program_id(0)
    exists = row < num_rows
    tl.store(token_ids_to + row, tl.load(token_ids + row, mask=exists, other=0))
    tl.store(positions_to + row, tl.load(positions + row, mask=exists, other=0))
    tl.store(slots_to + row, tl.load(slots + row, mask=exists, other=-1))
    tl.store(context_lens_to + row, tl.load(context_lens + row, mask=exists, other=0))
    if exists:
        for start in range(0, width, TILE):
            column = start + tl.arange(0, TILE)
            block = tl.load(tables + row.to(tl.int64) * stride_from + column, mask=column < width, other=0)
            tl.store(tables_to + row.to(tl.int64) * stride_to + column, block, mask=column < width)
