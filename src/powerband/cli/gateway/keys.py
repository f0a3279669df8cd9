"""`powerband keys`: create, list, limit and revoke the API keys of a gateway, through its admin API."""

from __future__ import annotations

import json as json_format
import sys
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from powerband.cli.flags import Json
from powerband.cli.gateway.admin_api import AdminApi, AdminKeyFile, Service, Url, find_gateway
from powerband.cli.tables import print_table
from powerband.errors import UsageError

Requests = Annotated[int | None, Parameter(help="Requests in any 60 seconds")]
Tokens = Annotated[int | None, Parameter(help="Tokens of prompts and outputs in any 60 seconds")]
Concurrency = Annotated[int | None, Parameter(help="Requests at once")]
Usd = Annotated[float | None, Parameter(help="Spend in USD, by the prices of the models")]
Period = Annotated[Literal["month", "total"] | None, Parameter(help="What --usd is for; default: a calendar month")]
Priority = Annotated[int | None, Parameter(help="Best class of its requests; lower is served first; default: 0")]
Models = Annotated[str | None, Parameter(help="Models that it may use, with commas; default: all")]
WhichKey = Annotated[str, Parameter(help="Id of a key, or its name")]

LIFTABLE = ("requests_per_min", "tokens_per_min", "max_concurrency", "usd", "models")
_UNITS = {"m": 60, "h": 3600, "d": 86400}


def create(
    name: Annotated[str, Parameter(help="Whose key it is; shown in usage and audit")],
    /,
    *,
    scopes: Annotated[str, Parameter(help="Of infer, metrics and admin, with commas")] = "infer",
    expires: Annotated[str | None, Parameter(help="Ends after this time, such as 12h or 90d; default: never")] = None,
    requests_per_min: Requests = None,
    tokens_per_min: Tokens = None,
    max_concurrency: Concurrency = None,
    usd: Usd = None,
    usd_period: Period = None,
    priority: Priority = None,
    models: Models = None,
    service: Service = None,
    url: Url = None,
    admin_key_file: AdminKeyFile = None,
    json: Json = False,
) -> int:
    """Make a key called NAME and print it. It is shown this once: the gateway keeps only its hash."""
    limits = _limits(requests_per_min, tokens_per_min, max_concurrency, usd, usd_period, priority, models)
    body: dict[str, Any] = {"name": name, "scopes": _split_names(scopes), "limits": limits}
    if expires is not None:
        body["expires_in_s"] = _seconds(expires)
    key = find_gateway(service, url, admin_key_file).call("POST", "/admin/keys", body)
    if json:
        print(json_format.dumps(key, indent=2))
        return 0
    print(key["secret"])
    print(f"{key['id']}  {key['name']}: this is the only time that the key is shown.", file=sys.stderr)
    return 0


def show_all(
    *, service: Service = None, url: Url = None, admin_key_file: AdminKeyFile = None, json: Json = False
) -> int:
    """List all keys, what they may use, and what they use now."""
    keys = find_gateway(service, url, admin_key_file).call("GET", "/admin/keys")["data"]
    if json:
        print(json_format.dumps(keys, indent=2))
        return 0
    print_table([_HEADINGS, *map(_row, keys)])
    return 0


def limit(
    key: WhichKey,
    /,
    *,
    requests_per_min: Requests = None,
    tokens_per_min: Tokens = None,
    max_concurrency: Concurrency = None,
    usd: Usd = None,
    usd_period: Period = None,
    priority: Priority = None,
    models: Models = None,
    lift: Annotated[str | None, Parameter(help=f"Limits to lift, with commas: {', '.join(LIFTABLE)}")] = None,
    service: Service = None,
    url: Url = None,
    admin_key_file: AdminKeyFile = None,
    json: Json = False,
) -> int:
    """Change what KEY may use, from its next request on. What is not named stays as it is."""
    limits = _limits(requests_per_min, tokens_per_min, max_concurrency, usd, usd_period, priority, models)
    for name in _split_names(lift or ""):
        if name not in LIFTABLE:
            raise UsageError(f"--lift has {name!r}; known are {', '.join(LIFTABLE)}.", param="lift")
        if name in limits:
            raise UsageError(f"{name} is set and lifted at once.", param="lift")
        limits[name] = [] if name == "models" else None
    if not limits:
        raise UsageError("No limit is named.", hint="'powerband keys limit --help' shows what there is.")
    api = find_gateway(service, url, admin_key_file)
    return _changed(api.call("PATCH", f"/admin/keys/{_find_key_id(api, key)}", {"limits": limits}), as_json=json)


def revoke(
    key: WhichKey,
    /,
    *,
    service: Service = None,
    url: Url = None,
    admin_key_file: AdminKeyFile = None,
    json: Json = False,
) -> int:
    """Close KEY at once. Requests that it has let in already may end."""
    api = find_gateway(service, url, admin_key_file)
    return _changed(api.call("DELETE", f"/admin/keys/{_find_key_id(api, key)}"), as_json=json)


def _changed(key: dict[str, Any], *, as_json: bool) -> int:
    if as_json:
        print(json_format.dumps(key, indent=2))
    else:
        print_table([_HEADINGS, _row(key)])
    return 0


def _find_key_id(api: AdminApi, text: str) -> str:
    keys = api.call("GET", "/admin/keys")["data"]
    if any(key["id"] == text for key in keys):
        return text
    found = [key["id"] for key in keys if key["name"] == text and key["revoked_at"] is None]
    if len(found) == 1:
        return str(found[0])
    what = f"Several keys are called {text!r}: {', '.join(found)}." if found else f"There is no key {text!r}."
    raise UsageError(what, hint="'powerband keys list' shows ids and names.", param="key")


def _limits(
    requests_per_min: int | None,
    tokens_per_min: int | None,
    max_concurrency: int | None,
    usd: float | None,
    usd_period: str | None,
    priority: int | None,
    models: str | None,
) -> dict[str, Any]:
    """Those that were given."""
    limits = {
        "requests_per_min": requests_per_min,
        "tokens_per_min": tokens_per_min,
        "max_concurrency": max_concurrency,
        "usd": usd,
        "usd_period": usd_period,
        "priority": priority,
        "models": None if models is None else _split_names(models),
    }
    return {name: value for name, value in limits.items() if value is not None}


def _split_names(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _seconds(text: str) -> float:
    unit = _UNITS.get(text[-1:])
    if unit is None or not text[:-1].isascii() or not text[:-1].isdigit() or not int(text[:-1]):
        raise UsageError(f"--expires is {text!r}.", hint="A number and m, h or d, such as 90d.", param="expires")
    return float(int(text[:-1]) * unit)


_HEADINGS = ["id", "name", "begins", "scopes", "state", "requests/min", "tokens/min", "at once", "USD", "models"]


def _row(key: dict[str, Any]) -> list[str]:
    limits, used = key["limits"], key["used"]
    spend = f"{used['usd']:.4g}"
    if limits["usd"] is not None:
        spend += f" of {limits['usd']:g} {'a month' if limits['usd_period'] == 'month' else 'in all'}"
    return [
        key["id"],
        key["name"],
        f"{key['prefix']}…",
        ",".join(key["scopes"]),
        _state(key),
        _used_of_limit(used["requests_last_min"], limits["requests_per_min"]),
        _used_of_limit(used["tokens_last_min"], limits["tokens_per_min"]),
        _used_of_limit(used["running"], limits["max_concurrency"]),
        spend,
        ",".join(limits["models"]) or "all",
    ]


def _used_of_limit(used: int, limit: int | None) -> str:
    return f"{used:,}" if limit is None else f"{used:,} of {limit:,}"


def _state(key: dict[str, Any]) -> str:
    if key["revoked_at"] is not None:
        return f"revoked {_date(key['revoked_at'])}"
    if key["expires_at"] is None:
        return "valid"
    over = key["expires_at"] <= datetime.now(UTC).timestamp()
    return f"{'expired' if over else 'until'} {_date(key['expires_at'])}"


def _date(at: float) -> str:
    return datetime.fromtimestamp(at).astimezone().strftime("%Y-%m-%d %H:%M")
