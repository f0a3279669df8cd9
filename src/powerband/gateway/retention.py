"""How long the gateway's books keep what. By itself, so that settings can be read without a database."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionOptions:
    """usage_retention_days: how long single requests and feedback are kept; daily sums stay.

    store_content: keep prompts and outputs, redacted, for content_retention_days.
    """

    usage_retention_days: float = 90.0
    store_content: bool = False
    content_retention_days: float = 7.0
