"""Blocks of KV cache as numbers: who refers to them, what they hold, which is reused next. O(1) per block.

blank    never held anything reusable: taken first
cached   no request refers to it, but its content has a key and may be found again: least recently used is taken first
in use   referred to by one request or, if its content has a key, by several
"""

from __future__ import annotations

from collections import OrderedDict

from powerband.errors import PowerbandError


class BlockPool:
    """Reference counts and content keys of `num_blocks` blocks."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.refs = [0] * num_blocks
        self.key_of: list[bytes | None] = [None] * num_blocks
        self.parent_of: list[bytes] = [b""] * num_blocks  # key of the block that leads to it, while it has a key itself
        self.published_in: list[int] = [0] * num_blocks  # the step, while the block has a key
        self.step = 0  # the one that is being scheduled, or was last
        self.block_of: dict[bytes, int] = {}
        self.blank = list(range(num_blocks - 1, -1, -1))
        self.cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        return len(self.blank) + len(self.cached)

    def take(self, count: int) -> list[int] | None:
        """Return `count` blocks with one reference each, or None when there are not as many."""
        if count > self.num_free:
            return None
        blocks = []
        for _ in range(count):
            if self.blank:
                block = self.blank.pop()
            else:
                block, _none = self.cached.popitem(last=False)
                self._remove_key(block)
            self.refs[block] = 1
            blocks.append(block)
        return blocks

    def hold(self, blocks: list[int]) -> None:
        """Add a reference to blocks that have a key."""
        for block in blocks:
            if self.refs[block] == 0:
                del self.cached[block]
            self.refs[block] += 1

    def release(self, block: int) -> None:
        """Take one reference away. Without any, a block is cached if it has a key, else blank."""
        if self.refs[block] <= 0:
            raise PowerbandError(f"Block {block} was released more often than held.", hint="Please report this.")
        self.refs[block] -= 1
        if self.refs[block] == 0:
            if self.key_of[block] is None:
                self.blank.append(block)
            else:
                self.cached[block] = None

    def publish(self, block: int, key: bytes, parent: bytes) -> None:
        """Make the content of a block in use findable under `key`, unless another block already is.

        parent: key of the block before it, which is then evicted after it; empty: the order does not matter.
        """
        if key not in self.block_of and self.key_of[block] is None:
            self.block_of[key] = block
            self.key_of[block] = key
            self.parent_of[block] = parent
            self.published_in[block] = self.step

    def touch(self, block: int) -> None:
        """Count a cached block as just used."""
        if block in self.cached:
            self.cached.move_to_end(block)

    def forget(self, block: int) -> None:
        """Make a block's content unfindable. References stay."""
        if self.key_of[block] is None:
            return
        self._remove_key(block)
        if self.refs[block] == 0:
            del self.cached[block]
            self.blank.append(block)

    def forget_since(self, step: int) -> None:
        """Make unfindable what was published in `step` or later. O(findable blocks)."""
        for block in [block for block in self.block_of.values() if self.published_in[block] >= step]:
            self.forget(block)

    def _remove_key(self, block: int) -> None:
        key = self.key_of[block]
        if key is None:
            return
        del self.block_of[key]
        self.key_of[block] = None

    def check(self) -> None:
        """Raise PowerbandError if counts and lists disagree. O(num_blocks): for tests and idle moments."""
        used = sum(refs > 0 for refs in self.refs)
        if self.num_free + used != self.num_blocks or len(set(self.blank)) != len(self.blank):
            raise PowerbandError(f"{used} blocks in use and {self.num_free} free are not {self.num_blocks} in all.")
        for block in self.blank:
            if self.refs[block] or self.key_of[block] is not None:
                raise PowerbandError(f"Block {block} is listed as blank but is referred to or has a key.")
        place = {block: i for i, block in enumerate(self.cached)}
        for block, i in place.items():
            if self.refs[block] or self.key_of[block] is None:
                raise PowerbandError(f"Block {block} is listed as cached but is in use or has no key.")
            self._check_parent(block, i, place)
        for key, block in self.block_of.items():
            if self.key_of[block] != key:
                raise PowerbandError(f"Block {block} is found under a key that is not its own.")
        if len(self.block_of) != sum(key is not None for key in self.key_of):
            raise PowerbandError("A block has a key under which it cannot be found.")

    def _check_parent(self, block: int, place_of_block: int, place: dict[int, int]) -> None:
        """Leaf first: a cached block is evicted before the block that leads to it."""
        parent = self.block_of.get(self.parent_of[block])
        if parent is not None and place.get(parent, self.num_blocks) < place_of_block:
            raise PowerbandError(f"Block {parent} would be evicted before block {block}, which follows it.")
