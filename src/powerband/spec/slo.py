"""What users are promised: limits on the latencies of a request, and the share of requests that must keep them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from powerband.errors import UsageError
from powerband.spec.config_reader import shown
from powerband.spec.quantities import seconds, share, shown_seconds

DEFAULT_ATTAINMENT = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class SLO:
    """Most seconds of each latency figure (see metrics.record); None: no limit. A request meets it when it meets all.

    attainment: the share of scheduled requests that must meet it.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    stall_s: float | None = None
    e2e_s: float | None = None
    attainment: float = DEFAULT_ATTAINMENT

    def __post_init__(self) -> None:
        for name, limit in ((field.name, getattr(self, field.name)) for field in fields(self)):
            is_share = name == "attainment"
            if limit is None and not is_share:
                continue
            is_number = isinstance(limit, int | float) and not isinstance(limit, bool)
            if not is_number or not 0 < limit < math.inf or (is_share and limit > 1):
                raise UsageError(
                    f"slo has {name}: {shown(limit)}.",
                    hint="Limits are seconds above 0, the attainment is a share above 0 and up to 1.",
                    param="slo",
                )

    @classmethod
    def parse(cls, text: str) -> SLO:
        """'ttft=500ms,tpot=50ms,attainment=99%', or in vLLM's spelling 'ttft:500 tpot:50 e2el:9000': bare numbers are
        ms. 'ttft=500ms@p99,tpot=50ms@p99' says the attainment, too: the share of requests that must meet all limits.
        Raises UsageError for what is not a figure, what is no time, and what is said twice.
        """
        values: dict[str, float] = {}
        percentiles: set[float] = set()
        for part in re.split(r"[,\s]+", text.strip()):
            name, sign, value = re.fullmatch(r"([^=:]*)([=:]?)(.*)", part).groups()  # type: ignore[union-attr] # matches anything
            name = _SPELLINGS.get(name.lower(), name.lower())
            if not sign or name not in (*LATENCIES, "attainment"):
                raise UsageError(
                    f"'{part}' is not part of an SLO.",
                    hint=f"Write it like ttft=500ms,tpot=50ms; figures: {', '.join(LATENCIES)}, attainment.",
                    param="slo",
                )
            key = name if name == "attainment" else f"{name}_s"
            if key in values:
                raise UsageError(f"The SLO '{text}' says {name} twice.", param="slo")
            is_share = name == "attainment"
            value, at, percentile = value.partition("@p")
            if at:
                percentiles.add(share(f"{percentile}%", param="slo"))
            values[key] = share(value, param=name) if is_share else seconds(value, param=f"slo {name}", unit="ms")
        shares = percentiles | ({values["attainment"]} if "attainment" in values else set())
        if len(shares) > 1:
            raise UsageError(
                f"The SLO '{text}' names several shares of requests.",
                hint="One share of requests must meet all limits: the same percentile at each.",
                param="slo",
            )
        return cls(**values, **({"attainment": shares.pop()} if percentiles and "attainment" not in values else {}))

    @classmethod
    def from_dict(cls, values: Any) -> SLO:
        """The inverse of `as_dict`. Raises UsageError for unknown names and values that are no numbers."""
        known = [field.name for field in fields(cls)]
        if not isinstance(values, Mapping) or set(values) - set(known):
            raise UsageError(f"slo is {shown(values)}.", hint=f"It may hold {', '.join(known)}.", param="slo")
        return cls(**values)

    def as_dict(self) -> dict[str, float]:
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}

    @property
    def limits(self) -> dict[str, float]:
        """Seconds by figure: 'ttft', 'tpot', 'stall', 'e2e'."""
        return {name: value for name in LATENCIES if (value := getattr(self, f"{name}_s")) is not None}

    def __str__(self) -> str:
        return ", ".join(f"{name.upper()} ≤ {shown_seconds(value)}" for name, value in self.limits.items())


LATENCIES = ("ttft", "tpot", "stall", "e2e")
_SPELLINGS = {"e2el": "e2e"}  # vLLM's
