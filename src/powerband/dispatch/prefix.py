"""Approximates the replicas' prefix caches: which backend has seen which prompt prefixes.

A prompt's bytes are cut into blocks, and each block's key is chained to the one before, so a key identifies all bytes
up to the end of its block. Blocks grow, so that 128 keys cover 1 MiB:

    bytes  0 ─ 256 ─ 512 ─ … ─ 4096 ─ 4608 ─ … ─ 12288 ─ …        16 of 256, 16 of 512, 16 of 1024, …
    keys      k0    k1           k15     k16

A plain set can then stand in for a replica's radix tree: the cached keys of a prompt are always its first ones.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from itertools import accumulate

_FIRST_BYTES = 256
_SAME_SIZE = 16
_MAX_KEYS = 128
_KEY_BYTES = 8
BLOCK_ENDS = tuple(accumulate(_FIRST_BYTES << (i // _SAME_SIZE) for i in range(_MAX_KEYS)))


def prefix_keys(endpoint: str, prompt: bytes, tenant: str, salt: bytes = b"") -> tuple[bytes, ...]:
    """Keys of a prompt's full blocks, first block first. Keys of different tenants are unrelated.

    prompt: the JSON of `messages` or `prompt` as received; a client that repeats a prompt repeats its bytes.
    salt: what precedes the prompt in the cache or separates caches, such as `tools` and `cache_salt`.
    """
    chain = blake2b(f"{endpoint} {len(tenant)} {tenant} {len(salt)} ".encode() + salt, digest_size=_KEY_BYTES)
    keys = []
    start = 0
    size = len(prompt)
    for end in BLOCK_ENDS:
        if end > size:
            break
        chain.update(prompt[start:end])
        keys.append(chain.copy().digest())
        start = end
    return tuple(keys)


def prefix_bytes(num_keys: int) -> int:
    """Bytes of the prefix that the first `num_keys` keys cover."""
    return BLOCK_ENDS[num_keys - 1] if num_keys else 0


class PrefixIndex:
    """The blocks that each backend has probably cached. max_blocks: per backend; the least recently used go first."""

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._known: dict[str, OrderedDict[bytes, None]] = {}

    def add(self, backend: str, keys: Sequence[bytes]) -> None:
        known = self._known.get(backend)
        if known is None:
            known = self._known[backend] = OrderedDict()
        for key in reversed(keys):  # the first block last, so that it is evicted last
            known[key] = None
            known.move_to_end(key)
        while len(known) > self._max_blocks:
            known.popitem(last=False)

    def cached_share(self, backend: str, keys: Sequence[bytes]) -> float:
        """The fraction of the keys' bytes that the backend has seen, 0 to 1."""
        known = self._known.get(backend)
        if not known or not keys or keys[0] not in known:
            return 0.0
        if keys[-1] in known:
            return 1.0
        matched = bisect_left(keys, True, key=lambda key: key not in known)
        return prefix_bytes(matched) / prefix_bytes(len(keys))

    def forget(self, backend: str) -> None:
        self._known.pop(backend, None)
