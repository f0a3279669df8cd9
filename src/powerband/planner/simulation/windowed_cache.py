"""The KV cache of an engine that keeps a window's last blocks only, for simulations of it: counts pages, moves none.

Our own engine keeps every block of a request, and is simulated with `core.kv_cache` itself.
"""

from __future__ import annotations

from powerband.core.kv_cache import CacheUsage, KVCacheManager, PrefixMatch
from powerband.core.request import Request
from powerband.spec.kv_layout import KVLayout

_MAX_IDS = 1 << 20  # where no layer sees everything, blocks outlive their pages


class WindowedKVCache(KVCacheManager):
    """Blocks are positions, as in the core; each takes its groups' pages, and those of windows while they last.

    Of a cached prefix, pages of windows count as if the request had computed it.
    """

    def __init__(self, num_pages: int, layout: KVLayout, *, prefix_caching: bool = True) -> None:
        self._num_pages = num_pages - layout.reserved
        num_blocks = self._num_pages // layout.groups if layout.groups else _MAX_IDS
        super().__init__(num_blocks, layout.block_size, prefix_caching=prefix_caching)
        self._layout = layout
        self._window_pages = 0

    @property
    def num_free(self) -> int:
        """Blocks, as if each took pages of every group."""
        each = self._layout.pages(1)
        return min(self.pool.num_free, self._free_pages() // each)

    def fits(self, r: Request, match: PrefixMatch, reserve: int = 0) -> bool:
        blocks = -(-len(r.tokens) // self.block_size)
        own = blocks - len(match.blocks) + match.num_idle + reserve
        needed = self._layout.groups * own + self._layout.window_pages(blocks)
        return needed <= self._free_pages() and super().fits(r, match, reserve)

    def attach(self, r: Request, match: PrefixMatch) -> None:
        super().attach(r, match)
        self._window_pages += self._layout.window_pages(len(r.blocks))

    def allocate(self, r: Request, n: int) -> list[int] | None:
        before = len(r.blocks)
        found = super().allocate(r, n)
        self._window_pages += self._layout.window_pages(len(r.blocks)) - self._layout.window_pages(before)
        return found

    def has_room(self, r: Request, n: int) -> bool:
        held = len(r.blocks)
        new = max(self._num_needed(r, n), 0)
        pages = self._layout.pages(held + new) - self._layout.pages(held)
        return pages <= self._free_pages() and super().has_room(r, n)

    def release(self, r: Request) -> None:
        self._window_pages -= self._layout.window_pages(len(r.blocks))
        super().release(r)

    def usage(self) -> CacheUsage:
        return CacheUsage(self._num_pages, self._num_pages - self._free_pages(), len(self.pool.cached))

    def _free_pages(self) -> int:
        used = self.pool.num_blocks - self.pool.num_free
        return self._num_pages - self._layout.groups * used - self._window_pages
