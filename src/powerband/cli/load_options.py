"""The options of a load, as flags: commands import them from here."""

from __future__ import annotations

from cyclopts import Group

from powerband.cli.flags import add_flags
from powerband.spec.workload.options import ArrivalOptions as ArrivalOptions
from powerband.spec.workload.options import MixOptions as MixOptions

REQUESTS = Group("Requests: what they are", sort_key=2)
add_flags(ArrivalOptions, Group("Load: when requests arrive", sort_key=1))
add_flags(MixOptions, REQUESTS)
