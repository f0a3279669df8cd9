"""`powerband scale`: change the number of replicas."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from powerband.cli.service.names import OldName


def scale(
    words: Annotated[
        tuple[str, ...],
        Parameter(
            name="[SERVICE] REPLICAS",
            help="Number of replicas; with several pools POOL=N, such as 0=2 1=1",
            negative="",
        ),
    ],
    /,
    *,
    name: OldName = None,
) -> int:
    """Change the number of replicas. New ones get requests once they are ready; removed ones finish theirs first.

    'powerband deploy' with a new plan keeps this number, unless --reset-replicas is given.
    """
    from powerband.cli.service.progress import ServiceProgress
    from powerband.fleet.scaling import scale
    from powerband.fleet.service.store import split_operands

    has_service = len(words) > 1 and "=" not in words[0]
    store, asked = split_operands(words, name, len(words) - has_service)
    print(scale(store, asked, ServiceProgress))
    return 0
