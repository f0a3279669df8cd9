"""`powerband keys`: create, list, limit and revoke the API keys of a gateway, through its admin API."""

from __future__ import annotations

import json as json_format
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from powerband.cli.flags import Json
from powerband.cli.gateway.admin_api import GatewayFlags, find_gateway
from powerband.cli.service.names import Service
from powerband.cli.tables import print_table
from powerband.errors import UsageError
from powerband.gateway.observability.account_tables import key_rows

if TYPE_CHECKING:
    from powerband.http_client.admin_client import AdminClient

WhichKey = Annotated[tuple[str, ...], Parameter(name="[SERVICE] KEY", help="Id or name of a key", negative="")]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class LimitFlags:
    """Fields have the names of the admin API's. None: not given."""

    requests_per_min: Annotated[int | None, Parameter(help="Maximum requests in any 60 seconds")] = None
    tokens_per_min: Annotated[
        int | None, Parameter(help="Maximum tokens, of prompts and outputs together, in any 60 seconds")
    ] = None
    max_concurrency: Annotated[int | None, Parameter(help="Maximum requests at the same time")] = None
    usd: Annotated[float | None, Parameter(help="Maximum spend in USD, at the prices of the models")] = None
    usd_period: Annotated[
        Literal["month", "total"] | None, Parameter(help="Period of --usd; default: a calendar month (UTC)")
    ] = None
    priority: Annotated[
        int | None, Parameter(help="Best priority that its requests may have; lower is served first; default: 0")
    ] = None
    models: Annotated[str | None, Parameter(help="Allowed models, separated by commas; default: all")] = None

    def given(self) -> dict[str, Any]:
        """Raises UsageError, with the option's name, for a value out of bounds."""
        from powerband.gateway.accounts.keys import MAX_LIMIT

        bounds = dict.fromkeys(("requests_per_min", "tokens_per_min", "max_concurrency"), (1, MAX_LIMIT))
        for name, (low, high) in {**bounds, "usd": (0, MAX_LIMIT), "priority": (-1000, 1000)}.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                option = f"--{name.replace('_', '-')}"
                raise UsageError(f"{option} is {value}; it must be between {low} and {high:g}.", param=name)
        limits = {**asdict(self), "models": None if self.models is None else _split_names(self.models)}
        return {name: value for name, value in limits.items() if value is not None}


LIFTABLE = ("requests_per_min", "tokens_per_min", "max_concurrency", "usd", "models")
_UNITS = {"m": 60, "h": 3600, "d": 86400}


def create(
    words: Annotated[
        tuple[str, ...],
        Parameter(name="[SERVICE] NAME", help="Name of the key, shown in usage and audit log", negative=""),
    ],
    /,
    *,
    scopes: Annotated[str, Parameter(help="Scopes, separated by commas: infer, metrics, admin")] = "infer",
    expires: Annotated[str | None, Parameter(help="Time until it expires, such as 12h or 90d; default: never")] = None,
    limits: LimitFlags | None = None,
    force: Annotated[bool, Parameter(help="Create it also if a valid key has this name", negative="")] = False,
    gateway: GatewayFlags | None = None,
    json: Json = False,
) -> int:
    """Create a key called NAME and print it, this once: the gateway stores only its hash.

    Refused if a valid key has this name, unless --force is given.
    """
    given = (limits or LimitFlags()).given()
    body: dict[str, Any] = {"scopes": _split_names(scopes), "limits": given}
    if expires is not None:
        body["expires_in_s"] = _seconds(expires)
    api, body["name"] = _find(gateway, words)
    key = api.call("POST", "/admin/keys", body | {"unique_name": not force})
    if json:
        print(json_format.dumps(key, indent=2))
        return 0
    print(key["secret"])
    print(f"{key['id']}  {key['name']}: the key is not shown again.", file=sys.stderr)
    return 0


def show_all(service: Service = None, /, *, gateway: GatewayFlags | None = None, json: Json = False) -> int:
    """List all keys with their limits and current usage."""
    keys = find_gateway(gateway, service).call("GET", "/admin/keys")["data"]
    if json:
        print(json_format.dumps(keys, indent=2))
        return 0
    print_table(key_rows(keys))
    return 0


def limit(
    words: WhichKey,
    /,
    *,
    limits: LimitFlags | None = None,
    lift: Annotated[str | None, Parameter(help=f"Limits to remove, separated by commas: {', '.join(LIFTABLE)}")] = None,
    gateway: GatewayFlags | None = None,
    json: Json = False,
) -> int:
    """Change the limits of KEY, from its next request on. Limits that are not given stay as they are."""
    changes = (limits or LimitFlags()).given()
    for name in _split_names(lift or ""):
        if name not in LIFTABLE:
            raise UsageError(f"--lift has {name!r}; known are {', '.join(LIFTABLE)}.", param="lift")
        if name in changes:
            raise UsageError(f"{name} is both set and lifted.", hint="Leave one out.", param="lift")
        changes[name] = [] if name == "models" else None
    if not changes:
        raise UsageError("No limit is given.", hint="'powerband keys limit --help' lists them.")
    api, key = _find(gateway, words)
    return _changed(api.call("PATCH", f"/admin/keys/{_find_key_id(api, key)}", {"limits": changes}), as_json=json)


def revoke(
    words: WhichKey,
    /,
    *,
    gateway: GatewayFlags | None = None,
    json: Json = False,
) -> int:
    """Revoke KEY at once. Its running requests may finish."""
    api, key = _find(gateway, words)
    return _changed(api.call("DELETE", f"/admin/keys/{_find_key_id(api, key)}"), as_json=json)


def _find(gateway: GatewayFlags | None, words: tuple[str, ...]) -> tuple[AdminClient, str]:
    """The gateway, and the word after the service's name."""
    if len(words) > 2:
        raise UsageError(f"Unexpected: {' '.join(words[2:])}.")
    return find_gateway(gateway, words[0] if len(words) > 1 else None), words[-1]


def _changed(key: dict[str, Any], *, as_json: bool) -> int:
    if as_json:
        print(json_format.dumps(key, indent=2))
    else:
        print_table(key_rows([key]))
    return 0


def _find_key_id(api: AdminClient, text: str) -> str:
    keys = api.call("GET", "/admin/keys")["data"]
    if any(key["id"] == text for key in keys):
        return text
    same = [key for key in keys if key["name"] == text]
    found = [str(key["id"]) for key in same if key["revoked_at"] is None]
    if len(found) == 1:
        return found[0]
    hint = "'powerband keys list' shows ids and names."
    if found:
        what, hint = f"Several keys are called {text!r}: {', '.join(found)}.", f"Name one by its id. {hint}"
    elif same:
        what = f"The key {text!r} was revoked already ({', '.join(str(key['id']) for key in same)})."
    else:
        what = f"There is no key {text!r}."
    raise UsageError(what, hint=hint, param="key")


def _split_names(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _seconds(text: str) -> float:
    unit = _UNITS.get(text[-1:])
    if unit is None or not text[:-1].isascii() or not text[:-1].isdigit() or not int(text[:-1]):
        raise UsageError(f"--expires is {text!r}.", hint="A number and m, h or d, such as 90d.", param="expires")
    return float(int(text[:-1]) * unit)
