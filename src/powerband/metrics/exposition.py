"""Reads pages of metrics in Prometheus' text format. What cannot be read is left out.

Format: https://prometheus.io/docs/instrumenting/exposition_formats/; of OpenMetrics, exemplars are passed over.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

# Of one metric. An engine has one sample for each model and rank.
MAX_SAMPLES = 1024
MAX_SAMPLE_BYTES = 64 << 10  # together
# Name, labels, value; a timestamp and an exemplar may follow. Possessive, so that no line is read twice.
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_SAMPLE = re.compile(rb'(\{[^"}]*+(?:%b[^"}]*+)*+\})?[ \t]*+([^ \t{}"]++)' % _STRING)
_LABEL = re.compile(rb'[{,][ \t]*+([^=",{}]++)="((?:[^"\\]|\\.)*+)"')


def samples(page: bytes, name: bytes) -> Iterator[tuple[bytes, float]]:
    """Labels ('{a="b"}', or nothing) and value of each sample of a metric; only finite ones.

    Ends at the first line of the metric that is no sample, and at the bounds. Takes 20 µs for a page of 100 kB.
    """
    line_start = b"\n" + name
    at = 0 if page.startswith(name) else page.find(line_start) + 1
    num_bytes = 0
    for _ in range(MAX_SAMPLES):
        if not at and not page.startswith(name):
            return
        end = page.find(b"\n", at, at + MAX_SAMPLE_BYTES)
        if end < 0:
            end = len(page)
        num_bytes += end - at
        if num_bytes > MAX_SAMPLE_BYTES:
            return
        line = page[at + len(name) : end]
        if line[:1] in (b"{", b" ", b"\t"):  # else another metric, whose name is longer
            found = _SAMPLE.match(line)
            try:
                value = float(found[2]) if found is not None else None
            except ValueError:
                value = None
            if found is None or value is None:
                return
            if math.isfinite(value):
                yield found[1] or b"", value
        at = page.find(line_start, end) + 1
        if not at:
            return


def label(labels: bytes, name: bytes) -> str | None:
    """Of a sample's labels."""
    return next((value.decode(errors="replace") for one, value in _LABEL.findall(labels) if one == name), None)


def total(page: bytes, name: bytes) -> float | None:
    """The sum of a metric's samples; None: there is none, or the sum is not finite."""
    values = [value for _, value in samples(page, name)]
    found = sum(values) if values else math.inf
    return found if math.isfinite(found) else None
