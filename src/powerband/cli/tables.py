"""Aligned plain text for people."""

from __future__ import annotations

from collections.abc import Sequence

from powerband.metrics.shown import table_lines


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """On stdout, in left-aligned columns."""
    print("\n".join(table_lines(rows)))
