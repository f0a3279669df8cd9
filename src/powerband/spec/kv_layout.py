"""How a KV cache is laid out for layers that see everything and layers with a sliding window, and what requests take.

    group   layers of one kind, as many in each; the last one may have fewer
    page    a block of positions in one group's layers; any page serves any group

    request     block 0 | block 1 | block 2 | block 3
    full           p      p      p      p      a page for each block of the request
    windowed       -      -      p      p      only the last blocks have one: pages before them are free again

Without windows there is one group, and a page is a block. So vLLM's hybrid KV cache manager does it, too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from powerband.spec.model.model_spec import LayerSpec

_NEARLY_EQUAL = 1.5  # kinds of layers so close in number are in one group each (vLLM's kv_cache_utils)


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The groups of a model's layers. What follows from them is in blocks and pages."""

    block_size: int  # positions of a block
    group_layers: int = 1  # layers of a group
    full: int = 1  # groups of layers that see everything
    windowed: int = 0  # groups of layers with a sliding window
    window: int = 0  # positions that these see, a token's own included
    step_tokens: int = 0  # new positions of a step at most: their blocks are held beside the window's

    @property
    def groups(self) -> int:
        return self.full + self.windowed

    @property
    def blocks_before(self) -> int:
        """Blocks before a token's own that a windowed group keeps at most."""
        return -(-(self.window - 1) // self.block_size)

    @property
    def step_blocks(self) -> int:
        return -(-self.step_tokens // self.block_size)

    @property
    def reserved(self) -> int:
        """Pages of a step's new tokens in the windowed groups, held until the next step."""
        return self.windowed * self.step_blocks

    def pages(self, blocks: int) -> int:
        """Of a request that has so many blocks and decodes."""
        return self.full * blocks + self.windowed * min(blocks, self.blocks_before + 1)

    def max_pages(self, blocks: int, computed: int = 0) -> int:
        """The most that a request holds until so many blocks of its prompt are computed, of which `computed` are."""
        new = min(blocks - computed, self.step_blocks + 1)
        return self.full * blocks + self.windowed * min(blocks, self.blocks_before + new)

    def max_tokens(self, num_pages: int) -> int:
        """Positions of the longest request that so many pages hold."""
        max_held = self.blocks_before + self.step_blocks + 1  # that a windowed group ever holds of a request
        if not self.windowed or num_pages < self.groups * max_held:
            return num_pages // self.groups * self.block_size
        if not self.full:
            return sys.maxsize
        return (num_pages - self.windowed * max_held) // self.full * self.block_size

    def tokens(self, num_pages: int, context: float) -> int:
        """Positions that so many pages hold, of requests of `context` positions each."""
        if not self.windowed:
            return num_pages // self.groups * self.block_size
        blocks = max(-(-int(context) // self.block_size), 1)
        together = int((num_pages - self.reserved) / self.pages(blocks) * max(context, 1.0))
        return max(together, min(int(context), self.max_tokens(num_pages)))

    def places(self, layers: Sequence[LayerSpec]) -> list[tuple[int, int]]:
        """Of each layer: its group, full ones first, and its place among the group's layers."""
        seen = {True: 0, False: 0}  # layers so far, by whether they are windowed
        places = []
        for layer in layers:
            kind = self.windowed > 0 and layer.window is not None and layer.window <= self.window
            first = self.full if kind else 0
            places.append((first + seen[kind] // self.group_layers, seen[kind] % self.group_layers))
            seen[kind] += 1
        return places


def kv_layout(layers: Sequence[LayerSpec], block_size: int, *, step_tokens: int, max_model_len: int) -> KVLayout:
    """The layout for a model's layers. A window that no request outgrows is none.

    Layers with several windows count with the largest of them. step_tokens: see KVLayout.
    """
    windows = [layer.window for layer in layers if layer.window is not None and layer.window < max_model_len]
    num_windowed, num_full = len(windows), len(layers) - len(windows)
    if not windows:
        return KVLayout(block_size, num_full)
    # As many layers in a group as there are of the rarer kind; where the kinds are nearly equal, of the other one.
    counts = [count for count in (num_full, num_windowed) if count]
    size = max(counts) if max(counts) < _NEARLY_EQUAL * min(counts) else min(counts)
    return KVLayout(block_size, size, -(-num_full // size), -(-num_windowed // size), max(windows), step_tokens)
