"""API keys: random, shown once, stored as SHA-256, compared in constant time, revoked immediately.

A key has 256 random bits, so that its digest cannot be reversed by brute force. A slow hash, as passwords need, would
only slow down every request.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from powerband.errors import InvalidRequest
from powerband.gateway.accounts.store import Store
from powerband.web.errors import HttpError

Scope = Literal["infer", "metrics", "admin"]
SCOPES: tuple[Scope, ...] = ("infer", "metrics", "admin")
PREFIX = "pb-"
MAX_KEYS = 100_000
MAX_LIMIT = 10**12
_MAX_NAME_CHARS = 100
_SHOWN = 10  # leading characters of a key, to recognize it by
_MAX_SECRET_BYTES = 200  # longer keys are not ours
_NO_DIGEST = bytes(32)
_PUT = "INSERT OR REPLACE INTO keys VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyLimits:
    """What a key may use. None: no limit. Raises InvalidRequest for a value out of range."""

    requests_per_min: int | None = None
    tokens_per_min: int | None = None
    max_concurrency: int | None = None
    usd: float | None = None  # spend in `usd_period`: a calendar month (UTC), or in total
    usd_period: Literal["month", "total"] = "month"
    priority: int = 0  # the best priority that its requests may have; lower is served first
    models: tuple[str, ...] = ()  # served names that it may use; (): all

    @property
    def counts_tokens(self) -> bool:
        """Whether a limit depends on the tokens of a request."""
        return self.tokens_per_min is not None or self.usd is not None

    def __post_init__(self) -> None:
        for name in ("requests_per_min", "tokens_per_min", "max_concurrency"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MAX_LIMIT:
                raise InvalidRequest(f"'{name}' is {value}; it must be between 1 and {MAX_LIMIT}.", param=name)
        if self.usd is not None and not 0 <= self.usd <= MAX_LIMIT:
            raise InvalidRequest(f"'usd' is {self.usd}; it must not be negative.", param="usd")
        if not -1000 <= self.priority <= 1000:
            raise InvalidRequest(f"'priority' is {self.priority}; it must be between -1000 and 1000.", param="priority")


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """An API key without its secret. prefix: the first characters of the secret. Times: seconds since 1970."""

    id: str
    name: str
    prefix: str
    scopes: tuple[Scope, ...]
    limits: KeyLimits = field(default_factory=KeyLimits)
    created_at: float
    expires_at: float | None = None
    revoked_at: float | None = None


class Keys:
    """All keys, in memory; every change is also written to the store. Used by the event loop's thread only."""

    def __init__(self, store: Store, wall: Callable[[], float] = time.time) -> None:
        self.rejected = 0  # requests with a wrong, expired or revoked key
        self._store = store
        self._wall = wall
        self._by_digest: dict[bytes, str] = {}
        self._digests: dict[str, bytes] = {}
        self._keys: dict[str, Key] = {}
        for key, digest in store.read(_load):
            self._remember(key, digest)

    def authenticate(self, values: Sequence[bytes]) -> Key:
        """The key of a request's Authorization headers. Raises HttpError 401, after the same work for each key."""
        if not values:
            raise HttpError(
                401, "missing_api_key", "This server needs an API key.", hint="Send 'Authorization: Bearer KEY'."
            )
        scheme, _, secret = values[0].partition(b" ")
        secret = secret.strip()
        digest = hashlib.sha256(secret[:_MAX_SECRET_BYTES]).digest()
        id = self._by_digest.get(digest, "")
        same = hmac.compare_digest(digest, self._digests.get(id, _NO_DIGEST))
        if not same or len(values) > 1 or len(secret) > _MAX_SECRET_BYTES or scheme.lower() != b"bearer":
            raise self._wrong("invalid_api_key", "The API key is wrong.")
        return self.current(self._keys[id])

    def current(self, key: Key) -> Key:
        """The key as it is now: a request may take long to arrive. Raises HttpError 401 if it is no longer valid."""
        key = self._keys[key.id]
        if self.is_valid(key):
            return key
        if key.revoked_at is not None:
            raise self._wrong("revoked_api_key", "The API key was revoked.")
        raise self._wrong("expired_api_key", "The API key has expired.")

    def admins(self) -> tuple[Key, ...]:
        """Valid keys with the scope admin."""
        return tuple(key for key in self._keys.values() if "admin" in key.scopes and self.is_valid(key))

    def is_valid(self, key: Key) -> bool:
        return key.revoked_at is None and (key.expires_at is None or key.expires_at > self._wall())

    def check_name_is_free(self, name: str) -> None:
        """Raises HttpError 409 if a valid key has the name."""
        same = [key.id for key in self._keys.values() if key.name == name and self.is_valid(key)]
        if same:
            raise HttpError(
                409,
                "key_exists",
                f"There is a key called {name!r} already: {', '.join(same)}.",
                hint="Choose another name, revoke that key, or create it with 'force'.",
                param="name",
            )

    def create(
        self,
        name: str,
        scopes: Iterable[str] = ("infer",),
        *,
        limits: KeyLimits | None = None,
        expires_at: float | None = None,
    ) -> tuple[Key, str]:
        """A new key, and its secret, which is not stored. Raises InvalidRequest."""
        if not name.strip() or len(name) > _MAX_NAME_CHARS or not name.isprintable():
            raise InvalidRequest(f"A key's name must have 1 to {_MAX_NAME_CHARS} printable characters.", param="name")
        if len(self._keys) >= MAX_KEYS:
            raise InvalidRequest(f"There are already {MAX_KEYS} keys, the maximum.")
        now = self._wall()
        if expires_at is not None and expires_at <= now:
            raise InvalidRequest("'expires_at' is in the past.", param="expires_at")
        secret = PREFIX + secrets.token_urlsafe(32)
        key = Key(
            id=f"key_{secrets.token_hex(8)}",
            name=name.strip(),
            prefix=secret[:_SHOWN],
            scopes=_scopes(scopes),
            limits=limits or KeyLimits(),
            created_at=now,
            expires_at=expires_at,
        )
        digest = hashlib.sha256(secret.encode()).digest()
        self._put(key, digest)
        return key, secret

    def list(self) -> tuple[Key, ...]:
        """Oldest first, including revoked keys."""
        return tuple(self._keys.values())

    def get(self, id: str) -> Key:
        """Raises HttpError 404."""
        key = self._keys.get(id)
        if key is None:
            raise HttpError(
                404, "key_not_found", "There is no key with this id.", hint="'powerband keys list' shows them."
            )
        return key

    def limit(self, id: str, limits: KeyLimits) -> Key:
        """Change the limits, from the next request on."""
        return self._put(replace(self.get(id), limits=limits), self._digests[id])

    def revoke(self, id: str) -> Key:
        """Reject the key from now on. Its running requests may finish: they have reserved what they can use."""
        key = self.get(id)
        if key.revoked_at is None:
            key = self._put(replace(key, revoked_at=self._wall()), self._digests[id])
        return key

    def _put(self, key: Key, digest: bytes) -> Key:
        limits = json.dumps(asdict(key.limits))
        row = (key.id, digest, key.prefix, key.name, json.dumps(key.scopes), limits)
        self._store.write(_PUT, (*row, key.created_at, key.expires_at, key.revoked_at))
        return self._remember(key, digest)

    def _remember(self, key: Key, digest: bytes) -> Key:
        self._keys[key.id] = key
        self._digests[key.id] = digest
        self._by_digest[digest] = key.id
        return key

    def _wrong(self, code: str, message: str) -> HttpError:
        self.rejected += 1
        return HttpError(401, code, message)


def _scopes(asked: Iterable[str]) -> tuple[Scope, ...]:
    wanted = set(asked)
    unknown = sorted(wanted - set(SCOPES))
    if unknown or not wanted:
        shown = f"'scopes' has {unknown[0]!r}" if unknown else "'scopes' is empty"
        raise InvalidRequest(f"{shown}; known are {', '.join(SCOPES)}.", param="scopes")
    return tuple(scope for scope in SCOPES if scope in wanted)


def _load(connection: sqlite3.Connection) -> list[tuple[Key, bytes]]:
    found = []
    for id, digest, prefix, name, scopes, limits, created_at, expires_at, revoked_at in connection.execute(
        "SELECT id, digest, prefix, name, scopes, limits, created_at, expires_at, revoked_at FROM keys "
        "ORDER BY created_at, rowid"
    ):
        values = json.loads(limits)
        values["models"] = tuple(values.get("models", ()))
        key = Key(
            id=id,
            name=name,
            prefix=prefix,
            scopes=_scopes(json.loads(scopes)),
            limits=KeyLimits(**values),
            created_at=created_at,
            expires_at=expires_at,
            revoked_at=revoked_at,
        )
        found.append((key, digest))
    return found
