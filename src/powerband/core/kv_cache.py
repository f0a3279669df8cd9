"""Which blocks a request owns, and which of them others may reuse (the prefix cache). Numbers only, no tensors.

    a request's blocks      [ 0 ][ 1 ][ 2 ][ 3 ][ 4 ][ 5 ]
                            |-shared-|---- its own -------|
                            |-- findable --|              |   full, confirmed and submitted: key in the pool, read-only
                                           |-- writable --|   only this request refers to them
    key chain               salt -> k0 -> k1 -> k2            k_i = sha256(k_{i-1}, tokens of block i)

A block is offered as soon as the step that fills it is submitted: executors run steps in order, and write all keys and
values of a layer before they attend, so that even a request of the same step may read it.

Of models with sliding windows, layers are in groups (spec.kv_layout), and a block has a page for each. `blocks` are
then pages, those of a block together, groups of full layers first, and the pool is one of pages:

    full, windowed          [ 0 | - ][ 1 | - ][ 2 | 7 ][ 3 | 8 ]      "-": nothing can see it any more (-1)

A prefix is found if the full groups have all of its blocks, and the windowed groups what its next token sees of them.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from powerband.core.block_pool import BlockPool
from powerband.core.request import Request
from powerband.errors import PowerbandError
from powerband.spec.kv_layout import KVLayout

NO_PAGE = -1  # in `Request.blocks`, where a window has passed


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """Leading blocks of a request that are already in the cache, and how many of their pages no request uses."""

    blocks: list[int]
    num_idle: int


@dataclass(frozen=True, slots=True)
class CacheUsage:
    """Blocks (with windows: pages) in all, in use by requests, and idle but with reusable content."""

    num_blocks: int
    num_used: int
    num_cached: int

    @property
    def share(self) -> float:
        return self.num_used / self.num_blocks


class KVCacheManager:
    """Hands out blocks of `block_size` positions and finds shared prefixes.

    layout: of a model with sliding windows; `num_blocks` is then a number of pages.
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, prefix_caching: bool = True, layout: KVLayout | None = None
    ) -> None:
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.layout = layout or KVLayout(block_size)
        self.num_groups = self.layout.groups
        self.pool = BlockPool(num_blocks)
        self._pack = struct.Struct(f"<{block_size}I").pack
        # Makes the key of a block the key of its page in a group.
        self._suffixes = [b"", *(group.to_bytes(2, "little") for group in range(1, self.num_groups))]

    @property
    def max_tokens(self) -> int:
        """Positions of the longest request that the whole cache can hold."""
        return self.layout.max_tokens(self.pool.num_blocks)

    @property
    def num_free(self) -> int:
        """Blocks that requests could get, with all of their pages."""
        return self.pool.num_free // self.num_groups

    def begin_step(self, index: int) -> None:
        """What is published from now on is computed by that step."""
        self.pool.step = index

    # Prefixes

    def match(self, r: Request) -> PrefixMatch:
        """Find the longest cached prefix that leaves at least one token to compute."""
        blocks, refs = self.matching_blocks(r), self.pool.refs
        return PrefixMatch(blocks, sum(block != NO_PAGE and refs[block] == 0 for block in blocks))

    def matching_blocks(self, r: Request) -> list[int]:
        """The blocks of `match`.

        A request that needs every position of its prompt computed matches nothing.
        """
        blocks: list[int] = []
        if not self.prefix_caching or not r.uses_prefix_cache:
            return blocks
        keys, find = r.block_keys, self.pool.block_of.get
        if len(keys) < len(r.tokens) // self.block_size:
            self._extend_keys(r)
        if self.num_groups > 1 or self.layout.windowed:
            return self._matching_pages(r)
        for i in range((len(r.tokens) - 1) // self.block_size):
            block = find(keys[i])
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _matching_pages(self, r: Request) -> list[int]:
        full = self.layout.full
        count = (len(r.tokens) - 1) // self.block_size
        if full:
            count = next((i for i in range(count) if self._find(r, i, 0, full) is None), count)
        if self.layout.windowed:
            count = self._end_of_windows(r, count)
        pages: list[int] = []
        first_seen = count - self.layout.blocks_before
        for i in range(count):
            pages += self._find(r, i, 0, full) or ()
            seen = self._find(r, i, full, self.num_groups) if i >= first_seen else None
            pages += seen or (NO_PAGE,) * self.layout.windowed
        return pages

    def _end_of_windows(self, r: Request, count: int) -> int:
        """The largest number of leading blocks, up to `count`, behind which a token finds all that its window sees."""
        needed, found = self.layout.blocks_before, 0
        for i in range(count - 1, -1, -1):
            if found == needed:
                break
            found += 1
            if self._find(r, i, self.layout.full, self.num_groups) is None:
                count, found = i, 0
        return count

    def _find(self, r: Request, i: int, first: int, end: int) -> list[int] | None:
        """Pages of block `i` in groups [first, end), if all of them are in the cache."""
        pages, key = [], r.block_keys[i]
        for suffix in self._suffixes[first:end]:
            page = self.pool.block_of.get(key + suffix)
            if page is None:
                return None
            pages.append(page)
        return pages

    # Blocks for a request

    def fits(self, r: Request, match: PrefixMatch, running: Sequence[Request] = ()) -> bool:
        """Whether every known token of `r` could be held besides `match`.

        A block for each of the running to grow into is left over, and whatever their prompts still need.
        """
        found = len(match.blocks) // self.num_groups
        need = self.layout.max_pages(-(-len(r.tokens) // self.block_size), found) + match.num_idle
        need += len(running) * self.num_groups - self._held(match.blocks, found)
        if self.layout.windowed:
            need += sum(self._promised(q) for q in running if q.capacity < len(q.tokens))
        return need <= self.pool.num_free

    def _promised(self, r: Request) -> int:
        """Pages that the rest of a prompt needs beside those that it has."""
        done, blocks = r.num_computed // self.block_size, -(-len(r.tokens) // self.block_size)
        held = len(r.blocks) - self.layout.windowed * r.num_passed
        return max(self.layout.max_pages(blocks, done) - held, 0)

    def _held(self, blocks: list[int], found: int) -> int:
        """Pages of `found` matched blocks."""
        return len(blocks) - self.layout.windowed * max(found - self.layout.blocks_before, 0)

    def attach(self, r: Request, match: PrefixMatch) -> None:
        """Give the matched blocks to `r`, which has none: their positions count as computed."""
        count = len(match.blocks) // self.num_groups
        r.num_passed = max(count - self.layout.blocks_before, 0) if self.layout.windowed else 0
        self.pool.hold(match.blocks if not r.num_passed else [page for page in match.blocks if page != NO_PAGE])
        r.blocks = list(match.blocks)
        r.num_published = count
        r.max_published = sys.maxsize
        r.num_computed = r.capacity = count * self.block_size

    def allocate_prompt(self, r: Request, n: int) -> None:
        """Make room for the known tokens of `r`, which fit; with windows for the next `n`, and `fits` keeps the rest.

        What is promised to one cannot be given to the next.
        """
        self.allocate(r, n if self.layout.windowed else len(r.tokens) - r.num_computed)

    def allocate(self, r: Request, n: int) -> list[int] | None:
        """Make room for `n` positions after `num_computed`; return the new blocks, or None when they do not fit."""
        if self.layout.windowed:
            self._free_passed(r)
        if not self.has_room(r, n):
            return None
        blocks = self.pool.take(max(self._num_needed(r, n), 0))
        if blocks:
            r.blocks += blocks
            r.capacity = len(r.blocks) // self.num_groups * self.block_size
        return blocks

    def has_room(self, r: Request, n: int) -> bool:
        """Whether `allocate` would succeed, even if nothing had left a window."""
        return self._num_needed(r, n) <= self.pool.num_free

    def _num_needed(self, r: Request, n: int) -> int:
        return -(-(r.num_computed + n) // self.block_size) * self.num_groups - len(r.blocks)

    def _free_passed(self, r: Request) -> None:
        """Give back the pages that no token from `num_computed` on can see. Steps in flight ran before what comes."""
        first = (r.num_computed - self.layout.window + 1) // self.block_size
        if first <= r.num_passed:
            return
        self.publish(r)  # they stay findable
        groups, end = self.num_groups, self._num_findable(r)
        for i in range(r.num_passed, first):
            for j in range(i * groups + self.layout.full, (i + 1) * groups):
                self._give_back(r, j, is_findable=i < end)
                r.blocks[j] = NO_PAGE
        r.num_passed = first

    def publish(self, r: Request) -> None:
        """Offer the full, confirmed and submitted blocks of `r` to others."""
        if self.prefix_caching:
            end, groups = self._num_publishable(r), self.num_groups
            for j in range(r.num_published * groups, end * groups):
                if r.blocks[j] != NO_PAGE:
                    self.pool.publish(r.blocks[j], *self._keys(r, j))
            r.num_published = max(r.num_published, end)

    def release(self, r: Request) -> None:
        """Take all blocks from `r`. Published ones stay findable until they are needed for something else."""
        end = self._num_findable(r) * self.num_groups
        # Tail first, so that the blocks which more requests can share live longest.
        for j in range(len(r.blocks) - 1, -1, -1):
            if r.blocks[j] != NO_PAGE:
                self._give_back(r, j, is_findable=j < end)
        r.blocks = []
        r.capacity = r.num_published = r.num_passed = 0

    def _give_back(self, r: Request, j: int, *, is_findable: bool) -> None:
        block = r.blocks[j]
        if is_findable and self.pool.key_of[block] is None:
            self._publish_or_touch(r, j)
        self.pool.release(block)

    def _publish_or_touch(self, r: Request, j: int) -> None:
        # Another request computed the same content first, and its block carries the key. It leads to the blocks
        # behind it that `r` published, so it must outlive them, or be replaced by ours if it is gone.
        key, parent = self._keys(r, j)
        twin = self.pool.block_of.get(key)
        if twin is None:
            self.pool.publish(r.blocks[j], key, parent)
        else:
            self.pool.touch(twin)

    def _keys(self, r: Request, j: int) -> tuple[bytes, bytes]:
        """Of a page: its key, and that of the page that leads to it. A windowed group needs no page's predecessor."""
        i, group = divmod(j, self.num_groups)
        suffix = self._suffixes[group]
        if group >= self.layout.full:
            return r.block_keys[i] + suffix, b""
        return r.block_keys[i] + suffix, r.block_keys[i - 1] + suffix if i else r.salt

    # Withdrawing

    def invalidate(self, r: Request, first: int) -> None:
        """Never again offer blocks of `r` from `first` on: their content is in doubt. See also `forget_since`."""
        r.max_published = min(r.max_published, first)
        r.num_published = min(r.num_published, first)

    def forget_since(self, step: int) -> None:
        """Forget what was published in a step that failed, or later: among it is all that may rest on the failure."""
        self.pool.forget_since(step)

    def reset(self, holders: Iterable[Request] = ()) -> None:
        """Forget all cached content. `holders`, the requests that own blocks, go on but publish nothing more."""
        for r in holders:
            r.num_published = r.max_published = 0
        for block in list(self.pool.block_of.values()):
            self.pool.forget(block)

    def usage(self) -> CacheUsage:
        pool = self.pool
        return CacheUsage(pool.num_blocks, pool.num_blocks - pool.num_free, len(pool.cached))

    def check(self, holders: Iterable[Request] = ()) -> None:
        """Raise PowerbandError if the pool's counts disagree with each other or with the requests that own blocks."""
        self.pool.check()
        refs = [0] * self.pool.num_blocks
        for r in holders:
            for block in r.blocks:
                if block != NO_PAGE:
                    refs[block] += 1
        if refs != self.pool.refs:
            raise PowerbandError("Reference counts differ from what requests hold.", hint="Please report this.")

    # Keys

    def _num_findable(self, r: Request) -> int:
        return self._num_publishable(r) if self.prefix_caching else 0

    def _num_publishable(self, r: Request) -> int:
        end = min(r.num_computed, len(r.tokens)) // self.block_size
        if end > len(r.block_keys):
            self._extend_keys(r)
        return min(end, r.max_published)

    def _extend_keys(self, r: Request) -> None:
        """Chain one key per full block of confirmed tokens: a key names the block and all before it."""
        size, tokens, keys = self.block_size, r.tokens, r.block_keys
        key = keys[-1] if keys else r.salt
        for i in range(len(keys), len(tokens) // size):
            key = hashlib.sha256(key + self._pack(*tokens[i * size : (i + 1) * size])).digest()
            keys.append(key)
