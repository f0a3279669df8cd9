"""`powerband drain`: stop sending new requests to a replica, or resume."""

from __future__ import annotations

import sys
from typing import Annotated

from cyclopts import Parameter

from powerband.cli.service.names import OldName


def drain(
    words: Annotated[
        tuple[str, ...],
        Parameter(name="[SERVICE] REPLICA", help="Id of the replica, from 'powerband status'", negative=""),
    ],
    /,
    *,
    name: OldName = None,
    undo: Annotated[bool, Parameter(help="Send it requests again", negative="")] = False,
    wait: Annotated[bool, Parameter(help="Wait until its requests have finished")] = True,
) -> int:
    """Stop sending new requests to a replica. Its requests finish; it keeps running and is not replaced."""
    from powerband.fleet import operations
    from powerband.fleet.service.store import split_operands

    store, (replica,) = split_operands(words, name, 1)
    operations.find_replica(store.read_status(), replica)
    if not undo and operations.is_last_ready(store, replica):
        print("warning: no other replica is ready: requests will wait in the queue, then time out.", file=sys.stderr)
    found = operations.drain(store, replica, undo=undo, wait=wait)
    if undo:
        print(f"{replica} gets requests again.")
    elif found is not None and found.running:
        print(f"{replica} gets no new requests; {found.running} are still running.")
    else:
        print(f"{replica} is drained. To undo: powerband drain {store.name} {replica} --undo")
    return 0
