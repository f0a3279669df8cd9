"""How an engine lays out a KV cache for a model with sliding windows: what requests take of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Layers of one kind are in groups of equal size; a page is `block_size` positions of one group.

    A page serves any group. In a group whose layers see everything, a request keeps a page for each block of its
    positions; where layers have a window, only pages of the last blocks, and those before are free again.
    """

    block_size: int
    groups: int  # of layers that see everything
    windows: tuple[tuple[int, int], ...] = ()  # (groups, blocks that a request keeps at most), by window
    reserved: int = 0  # pages for the blocks of a step's new tokens, before those that leave a window are free

    def pages(self, blocks: int) -> int:
        """Of a request with so many blocks of positions."""
        return self.groups * blocks + self.window_pages(blocks)

    def window_pages(self, blocks: int) -> int:
        return sum(groups * min(blocks, kept) for groups, kept in self.windows)

    def tokens(self, num_pages: int, context: float) -> int:
        """Positions that so many pages hold, of requests of `context` positions each."""
        blocks = max(-(-int(context) // self.block_size), 1)
        return int((num_pages - self.reserved) / self.pages(blocks) * max(context, 1.0))
