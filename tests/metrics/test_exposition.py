"""Pages of metrics are read as Prometheus reads them, whatever stands in them."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from powerband.dispatch.backend import ReplicaLoad
from powerband.engines.metrics import parse_metrics
from powerband.engines.registry import ADAPTERS
from powerband.fleet.monitor.replica_metrics import read_metrics
from powerband.gateway.dispatch.health import read_load
from powerband.metrics.exposition import MAX_SAMPLE_BYTES, MAX_SAMPLES, label, samples, total

LABEL_TEXT = st.text(
    st.characters(codec="utf-8", exclude_characters="\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"), max_size=8
)


@given(st.lists(st.tuples(LABEL_TEXT, st.floats(-1e9, 1e9), st.none() | st.integers(0, 2**40)), min_size=1, max_size=6))
def test_samples_are_those_that_prometheus_reads(rows: list[tuple[str, float, int | None]]) -> None:
    page = "# TYPE m gauge\n"
    for text, value, timestamp in rows:
        escaped = text.replace("\\", r"\\").replace('"', r"\"")
        page += f'm{{a="{escaped}",le="1"}} {value}{"" if timestamp is None else f" {timestamp}"}\n'
    page += "mm 7\n"
    family, *_ = text_string_to_metric_families(page)
    expected = [sample.value for sample in family.samples if sample.name == "m"]
    found = list(samples(page.encode(), b"m"))
    assert [value for _, value in found] == expected
    assert {label(labels, b"le") for labels, _ in found} == {"1"}


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("m 3", 3),
        ("m\t3 1712345678000", 3),
        ('m{a="}"} 3 1712345678000', 3),
        ('m{a="b"} 3 # {trace_id="c"} 0.67 1.5', 3),
        ("m 3\r", 3),
        ("m NaN", None),
        ("m +Inf", None),
        ("m", None),
        ("m ", None),
        ('m{a="b} 3', None),
        ("m three", None),
        ("mm 3", None),
        ("m 1e308\nm 1e308", None),
        ("m NaN\nm 2", 2),
    ],
)
def test_what_can_be_read_counts_and_nothing_else(line: str, value: float | None) -> None:
    assert total(f"# HELP m x\n{line}\n".encode(), b"m") == value
    assert total(line.encode(), b"m") == value


@given(st.binary(max_size=60), st.sampled_from((" ", "{", '{le="', '{a="b"} ')))
def test_no_page_makes_a_reader_fail(noise: bytes, opening: str) -> None:
    names = ("vllm:num_requests_running", "vllm:kv_cache_usage_perc", "powerband_step_residual_ratio_bucket")
    page = b"".join(f"\n{name}{opening}".encode() + noise for name in names)
    load = read_load(page, ADAPTERS["vllm"])
    metrics = read_metrics(page.decode(errors="replace"))
    assert all(math.isfinite(value) for value in (*parse_metrics(page).values(), *metrics.values.values()))
    assert isinstance(load, ReplicaLoad)


def test_a_sum_beyond_all_numbers_is_no_figure() -> None:
    page = b"vllm:num_requests_running 1e308\nvllm:num_requests_running 1e308\n"
    assert read_load(page, ADAPTERS["vllm"]) == ReplicaLoad()


def test_the_first_name_of_a_figure_that_is_there_counts() -> None:
    page = b"vllm:gpu_cache_usage_perc 0.25\nvllm:num_requests_running 4 1712345678000\n"
    assert parse_metrics(page) == {"kv_usage": 0.25, "running": 4.0}
    assert read_metrics(page.decode()).values == {"kv_usage": 0.25, "running": 4.0}


def test_of_endless_samples_the_first_are_added_up() -> None:
    assert total(b"m 1\n" * 100_000, b"m") == MAX_SAMPLES
    long = b'm{a="%b"} 1\n' % (b"x" * 1000)
    assert total(long * 10_000, b"m") == MAX_SAMPLE_BYTES // len(long)
    assert total(b'm{a="%b"} 1\n' % (b"x" * MAX_SAMPLE_BYTES), b"m") is None


def test_a_metric_ends_at_the_first_line_that_is_no_sample() -> None:
    assert total(b"m 1\nm x\nm 1\n", b"m") == 1
    assert total(b"m x\nm 1\n", b"m") is None
    assert total(b"mm x\nm 1\n", b"m") == 1  # another metric


def test_lines_of_metrics_with_longer_names_are_bounded_too() -> None:
    assert total(b"m_x 1\n" * (MAX_SAMPLES - 1) + b"m 1\n", b"m") == 1
    assert total(b"m_x 1\n" * MAX_SAMPLES + b"m 1\n", b"m") is None


@pytest.mark.parametrize(
    "line",
    [
        b"vllm:num_requests_running x\n",
        b"vllm:num_requests_running_x 1\n",
        b'vllm:num_requests_running{a="b"} 1\n',
        b"vllm:num_requests_running{" + b'a="x",' * 200 + b"} 1\n",
        b'vllm:num_requests_running{a="' + b'a="' * 100 + b"\n",
        b'vllm:num_requests_running{a="' + rb"\\" * 500 + b'"} 1\n',
    ],
    ids=["no number", "longer name", "samples", "labels", "open labels", "backslashes"],
)
def test_a_page_of_nothing_else_costs_little_more_than_one_without(line: bytes) -> None:
    names = ADAPTERS["vllm"]

    def seconds(page: bytes) -> float:
        found = math.inf
        for _ in range(5):
            start_s = time.thread_time()
            read_load(page, names)
            found = min(found, time.thread_time() - start_s)
        return found

    of_others = seconds(b"another_metric_of_this_engine 1\n" * ((1 << 20) // 32))
    assert seconds(line * ((1 << 20) // len(line))) < 10 * of_others
