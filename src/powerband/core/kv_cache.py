"""Which blocks a request owns, and which of them others may reuse (the prefix cache). Numbers only, no tensors.

    a request's blocks      [ 0 ][ 1 ][ 2 ][ 3 ][ 4 ][ 5 ]
                            |-shared-|---- its own -------|
                            |-- findable --|              |   full, confirmed and submitted: key in the pool, read-only
                                           |-- writable --|   only this request refers to them
    key chain               salt -> k0 -> k1 -> k2            k_i = sha256(k_{i-1}, tokens of block i)

A block is offered as soon as the step that fills it is submitted: executors run steps in order, and write all keys and
values of a layer before they attend, so that even a request of the same step may read it.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from powerband.core.block_pool import BlockPool
from powerband.core.request import Request
from powerband.errors import PowerbandError


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """Leading blocks of a request that are already in the cache, and how many of them no request uses."""

    blocks: list[int]
    num_idle: int


@dataclass(frozen=True, slots=True)
class CacheUsage:
    """Blocks in all, in use by requests, and idle but with reusable content."""

    num_blocks: int
    num_used: int
    num_cached: int

    @property
    def share(self) -> float:
        return self.num_used / self.num_blocks


class KVCacheManager:
    """Hands out blocks of `block_size` positions and finds shared prefixes."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.pool = BlockPool(num_blocks)
        self._pack = struct.Struct(f"<{block_size}I").pack

    @property
    def max_tokens(self) -> int:
        """Positions that the whole cache can hold."""
        return self.pool.num_blocks * self.block_size

    @property
    def num_free(self) -> int:
        """Blocks that requests could get."""
        return self.pool.num_free

    def match(self, r: Request) -> PrefixMatch:
        """Find the longest cached prefix that leaves at least one token to compute."""
        blocks, refs = self.matching_blocks(r), self.pool.refs
        return PrefixMatch(blocks, sum(refs[block] == 0 for block in blocks))

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
        for i in range((len(r.tokens) - 1) // self.block_size):
            block = find(keys[i])
            if block is None:
                break
            blocks.append(block)
        return blocks

    def fits(self, r: Request, match: PrefixMatch, reserve: int = 0) -> bool:
        """Whether every known token of `r` could be held besides `match`, with `reserve` blocks left over."""
        need = -(-len(r.tokens) // self.block_size) - len(match.blocks)
        return need + match.num_idle + reserve <= self.pool.num_free

    def attach(self, r: Request, match: PrefixMatch) -> None:
        """Give the matched blocks to `r`, which has none: their positions count as computed."""
        self.pool.hold(match.blocks)
        r.blocks = list(match.blocks)
        r.num_published = len(match.blocks)
        r.max_published = sys.maxsize
        r.num_computed = r.capacity = len(match.blocks) * self.block_size

    def allocate(self, r: Request, n: int) -> list[int] | None:
        """Make room for `n` positions after `num_computed`; return the new blocks, or None when they do not fit."""
        if not self.has_room(r, n):
            return None
        blocks = self.pool.take(max(self._num_needed(r, n), 0))
        if blocks:
            r.blocks += blocks
            r.capacity = len(r.blocks) * self.block_size
        return blocks

    def has_room(self, r: Request, n: int) -> bool:
        """Whether `allocate` would succeed."""
        return self._num_needed(r, n) <= self.pool.num_free

    def _num_needed(self, r: Request, n: int) -> int:
        return -(-(r.num_computed + n) // self.block_size) - len(r.blocks)

    def publish(self, r: Request) -> None:
        """Offer the full, confirmed and submitted blocks of `r` to others."""
        if self.prefix_caching:
            end = self._num_publishable(r)
            for i in range(r.num_published, end):
                self.pool.publish(r.blocks[i], r.block_keys[i], r.block_keys[i - 1] if i else r.salt)
            r.num_published = max(r.num_published, end)

    def release(self, r: Request) -> None:
        """Take all blocks from `r`. Published ones stay findable until they are needed for something else."""
        pool = self.pool
        num_findable = self._num_publishable(r) if self.prefix_caching else 0
        # Tail first, so that the blocks which more requests can share live longest.
        for i in range(len(r.blocks) - 1, -1, -1):
            block = r.blocks[i]
            if i < num_findable and pool.key_of[block] is None:
                self._publish_or_touch(r, i)
            pool.release(block)
        r.blocks = []
        r.capacity = r.num_published = 0

    def _publish_or_touch(self, r: Request, i: int) -> None:
        # Another request computed the same content first, and its block carries the key. It leads to the blocks
        # behind it that `r` published, so it must outlive them, or be replaced by ours if it is gone.
        twin = self.pool.block_of.get(r.block_keys[i])
        if twin is None:
            self.pool.publish(r.blocks[i], r.block_keys[i], r.block_keys[i - 1] if i else r.salt)
        else:
            self.pool.touch(twin)

    def invalidate(self, r: Request, start: int) -> set[int]:
        """Withdraw the blocks of `r` from the one that holds position `start` on; return those blocks.

        Whatever was published behind them cannot be found any more either.
        """
        first = start // self.block_size
        r.max_published = min(r.max_published, first)
        r.num_published = min(r.num_published, first)
        for block in r.blocks[first:]:
            self.pool.forget(block)
        self._forget_behind(r.block_keys[first:])
        return set(r.blocks[first:])

    def _forget_behind(self, keys: list[bytes]) -> None:
        pool = self.pool
        children: dict[bytes, list[bytes]] = {}
        for key, block in pool.block_of.items():
            children.setdefault(pool.parent_of[block], []).append(key)
        found = [child for key in keys for child in children.get(key, ())]
        for key in found:  # grows while we walk
            found += children.get(key, ())
        for key in found:
            if key in pool.block_of:
                pool.forget(pool.block_of[key])

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
                refs[block] += 1
        if refs != self.pool.refs:
            raise PowerbandError("Reference counts differ from what requests hold.", hint="Please report this.")

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
