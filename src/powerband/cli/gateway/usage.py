"""`powerband usage`: requests, tokens and cost by key and model. `powerband audit`: what administrators did."""

from __future__ import annotations

import json as json_format
import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from powerband.cli.flags import Json
from powerband.cli.gateway.admin_api import GatewayFlags, find_gateway
from powerband.cli.service.names import Service
from powerband.cli.tables import print_table
from powerband.errors import EnvironmentFault, UsageError
from powerband.gateway.observability.account_tables import audit_rows, usage_rows
from powerband.spec.quantities import count_text

_PAGE = 1000
_COLUMNS = ("requests", "errors", "refused", "prompt_tokens", "cached_tokens", "output_tokens", "cost_usd")
_LATER_COLUMNS = ("estimated", "ttft_p50_s", "ttft_p95_s", "score", "scored", "reasoning_tokens")


def usage(
    service: Service = None,
    /,
    *,
    by: Annotated[str, Parameter(help="Columns to group by, separated by commas: key, model, day")] = "key,model",
    since: Annotated[str, Parameter(help="Time span, such as 30m, 24h or 7d; above 7d in whole days")] = "24h",
    csv: Annotated[
        Path | None, Parameter(help="Write the rows to this file; '-': stdout", allow_leading_hyphen=True)
    ] = None,
    gateway: GatewayFlags | None = None,
    json: Json = False,
) -> int:
    """Show requests, tokens, latency and cost, by key and model."""
    if csv is not None and json:
        raise UsageError("Both --csv and --json are given.", hint="Give one.", param="csv")
    import urllib.parse

    query = urllib.parse.urlencode({"by": by, "since": since})
    found = find_gateway(gateway, service).call("GET", f"/admin/usage?{query}")
    if json:
        print(json_format.dumps(found, indent=2))
    elif csv is not None:
        _write_csv(csv, found)
    else:
        print_table(usage_rows(found))
    _warn(found.get("database") or found["books"])  # a gateway of the version before has only the latter
    return 0


def audit(
    service: Service = None,
    /,
    *,
    after: Annotated[int, Parameter(help="Show only entries after this number")] = 0,
    gateway: GatewayFlags | None = None,
    json: Json = False,
) -> int:
    """Show the audit log of administrators' actions and verify its hash chain. Exits with 1 if it was tampered with."""
    api = find_gateway(gateway, service)
    answer = api.call("GET", f"/admin/audit?check=1&after={max(0, after)}&limit={_PAGE}")
    entries, page = list(answer["data"]), answer["data"]
    while len(page) == _PAGE:
        page = api.call("GET", f"/admin/audit?after={page[-1]['seq']}&limit={_PAGE}")["data"]
        entries += page
    if json:
        print(json_format.dumps({**answer, "data": entries}, indent=2))
    else:
        print_table(audit_rows(entries))
    if answer["broken_at"] is None:
        return 0
    print(f"The hash chain is broken: entry {answer['broken_at']} was changed or is missing.", file=sys.stderr)
    return 1


def _write_csv(path: Path, found: dict[str, Any]) -> None:
    import csv as csv_format

    names = [*found["by"], *(["key_name"] if "key" in found["by"] else []), *_COLUMNS, *_LATER_COLUMNS]
    rows = [[row.get(name, 0) for name in names] for row in found["data"]]  # gateways of 0.1 count no reasoning
    if str(path) == "-":
        csv_format.writer(sys.stdout, lineterminator="\n").writerows([names, *rows])
        return
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            csv_format.writer(file).writerows([names, *rows])
    except OSError as error:
        raise EnvironmentFault(f"Cannot write {path}: {error.strerror}.", param="csv") from None


def _warn(accounts: dict[str, Any]) -> None:
    """What the figures do not include."""
    if accounts["failing_s"]:
        waiting = f"{count_text(accounts['usage_waiting'], 'request')} not written yet"
        print(
            f"warning: the gateway could not write its database for {accounts['failing_s']:.0f} s; {waiting}.",
            file=sys.stderr,
        )
    if accounts["usage_dropped"]:
        lost = f"the details of {count_text(accounts['usage_dropped'], 'request')} since its start"
        print(f"warning: the gateway lost {lost}: their sums are counted, their latencies are not.", file=sys.stderr)
