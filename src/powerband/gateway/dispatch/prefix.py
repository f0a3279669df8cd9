"""Which prompts begin alike, and which replica has seen such a beginning: the gateway's guess at the replicas' caches.

A prompt's bytes are cut into blocks, and each block's key is chained to the one before, so that a key stands for all
bytes up to its end. Blocks become longer, so that 128 keys reach as far as is worth looking, 1 MiB:

    bytes  0 ─ 256 ─ 512 ─ … ─ 4096 ─ 4608 ─ … ─ 12288 ─ …        16 of 256, 16 of 512, 16 of 1024, …
    keys      k0    k1           k15     k16

A replica's radix tree is then a plain set: the keys of a prompt that are in it are the first so many.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from itertools import accumulate

from powerband.gateway.request import Endpoint

_FIRST_BYTES = 256
_SAME_SIZE = 16
_MOST_KEYS = 128
_KEY_BYTES = 8
_ENDS = tuple(accumulate(_FIRST_BYTES << (i // _SAME_SIZE) for i in range(_MOST_KEYS)))


def keys_of(endpoint: Endpoint, prompt: bytes, tenant: str, salt: bytes = b"") -> tuple[bytes, ...]:
    """Keys of the whole blocks at a prompt's beginning. A tenant's keys tell nothing of another's.

    prompt: the JSON of `messages` or `prompt` as it came: what a client sends twice, it sends alike. salt: what stands
    before it or keeps caches apart, such as `tools` and `cache_salt`.
    """
    chain = blake2b(f"{endpoint} {len(tenant)} {tenant} {len(salt)} ".encode() + salt, digest_size=_KEY_BYTES)
    keys = []
    start = 0
    size = len(prompt)
    for end in _ENDS:
        if end > size:
            break
        chain.update(prompt[start:end])
        keys.append(chain.copy().digest())
        start = end
    return tuple(keys)


def bytes_of(num_keys: int) -> int:
    """That so many first keys stand for."""
    return _ENDS[num_keys - 1] if num_keys else 0


class PrefixIndex:
    """What each replica has probably cached. most: blocks remembered of each; those used longest ago are forgotten."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: dict[str, OrderedDict[bytes, None]] = {}

    def sent(self, replica: str, keys: Sequence[bytes]) -> None:
        known = self._known.get(replica)
        if known is None:
            known = self._known[replica] = OrderedDict()
        for key in reversed(keys):  # the beginning last, so that it lives longest
            known[key] = None
            known.move_to_end(key)
        while len(known) > self._most:
            known.popitem(last=False)

    def share(self, replica: str, keys: Sequence[bytes]) -> float:
        """Of the bytes that the keys stand for, how much the replica has seen: 0 to 1."""
        known = self._known.get(replica)
        if not known or not keys or keys[0] not in known:
            return 0.0
        if keys[-1] in known:
            return 1.0
        matched = bisect_left(keys, True, key=lambda key: key not in known)
        return bytes_of(matched) / bytes_of(len(keys))

    def forget(self, replica: str) -> None:
        self._known.pop(replica, None)

    def keep_only(self, replicas: Iterable[str]) -> None:
        kept = set(replicas)
        self._known = {replica: known for replica, known in self._known.items() if replica in kept}
