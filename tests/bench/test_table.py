"""What a terminal shows of a run, of a comparison, and while it runs."""

from __future__ import annotations

import io
import re
import time
from dataclasses import replace

import pytest
from msgspec.structs import replace as replace_sample
from rich.console import Console
from samples_for_tests import LIMITS, load, point, report, workload

from powerband.bench.client.messages import WorkerProgress
from powerband.bench.load import Live
from powerband.bench.report.live import LiveView
from powerband.bench.report.results import ErrorGroup, Point, RunReport
from powerband.bench.report.table import run_table
from powerband.metrics.record import Outcome
from powerband.metrics.shown import digits, plain, share_text, time_interval_text, time_text


def shown(run: RunReport, width: int = 80) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(run_table(run))
    return file.getvalue()


def hostile(one: Point) -> Point:
    message = "\x1b[2J\x1b]0;owned\x07 [bold]no markup[/bold] \u202ebackwards"
    return replace(one, label="\x1b[31mred", errors=(ErrorGroup("error", 500, message, 3),))


def test_the_verdict_comes_first_with_its_reason():
    text = shown(report(point(load(requests=700, failures=0.02))))
    first, *_ = text.splitlines()
    assert re.match(r"PASS  9\d\.\d % of requests kept TTFT ≤ 500ms, TPOT ≤ 50ms \(9\d\.\d–9\d\.\d % at 95 %\)", first)
    assert "goodput" in text.splitlines()[2]
    for name in ("TTFT", "service TTFT", "TPOT", "ITL", "stall", "E2E", "Throughput", "Requests", "Client", "Server"):
        assert re.search(rf"^{name}\b", text, re.MULTILINE), name


def test_an_invalid_run_says_so_before_any_figure():
    text = shown(report(point(load(lag_s=0.05))))
    assert re.match(r"INVALID  The client sent \d+ of \d+ requests more than 5\.0 ms late", text)
    assert "are not about the server" in " ".join(text.split())


def test_percentiles_of_too_few_requests_are_dashes():
    row = next(line for line in shown(report(point(load(requests=100)))).splitlines() if line.startswith("TTFT"))
    assert row.split().count("–") == 3, "p95, p99 and its interval"


@pytest.mark.parametrize("width", [80, 120])
def test_it_fits_and_is_plain_text_when_piped(width: int):
    many = report(*(hostile(point(load(rate, 150, failures=0.1), rate)) for rate in (4.0, 16.0, 48.0)))
    for run in (report(hostile(point(load(requests=700, failures=0.05)))), many):
        text = shown(replace(run, target=replace(run.target, model="\x1b[31mmodel\x07 [red]")), width)
        assert max(map(len, text.splitlines())) <= width
        assert all(char.isprintable() or char == "\n" for char in text)
        assert "[red]" in text, "no markup of rich's"


def test_several_loads_are_a_row_each():
    text = shown(report(point(load(4.0, 150), 4.0), point(load(lag_s=0.05), 8.0), point(load(60.0, 400), 60.0)))
    rows = [line.split() for line in text.splitlines() if re.match(r"\d+/s ", line)]
    assert [row[:2] for row in rows] == [["4/s", "PASS"], ["8/s", "INVALID"], ["60/s", "MISSED"]]
    assert re.search(r"^8/s: the client sent \d+ of \d+ requests", text, re.MULTILINE)


def test_kinds_of_failures_are_listed_with_their_counts():
    text = shown(report(point(load(requests=300, failures=0.3))))
    assert re.search(r"\d+ × refused: HTTP 429, the queue is full", text)
    assert "timed out" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.000123, "0.123 ms"),
        (0.0999, "99.9 ms"),
        (0.118, "118 ms"),
        (0.9994, "999 ms"),
        (0.9996, "1.00 s"),
        (187.2, "187 s"),
    ],
)
def test_times_have_three_digits(seconds: float, text: str):
    assert time_text(seconds) == text


def test_what_is_not_told_is_a_dash():
    assert [time_text(None), digits(None), share_text(None), time_interval_text(None)] == ["–"] * 4


def test_a_share_is_all_or_nothing_only_when_it_is():
    assert [share_text(x) for x in (0.0, 0.00001, 0.5, 0.99999, 1.0)] == ["0 %", "0.1 %", "50.0 %", "99.9 %", "100 %"]


def test_foreign_text_cannot_steer_a_terminal():
    assert plain("a\x1b[31m\r\n\u202e\x9bé漢") == "a�[31m����é漢"


def live_of(elapsed_s: float, seed: int = 0) -> Live:
    result = load(requests=100, failures=0.1, seed=seed)
    live = Live(result.schedule, start_at=time.monotonic() - elapsed_s, samples=list(result.samples))
    live.workers[0] = WorkerProgress(sent=100, running=3)
    return live


def test_without_a_terminal_a_line_is_told_every_five_seconds():
    file, now = io.StringIO(), [0.0]
    with LiveView(LIMITS, label="6/s", console=Console(file=file), clock=lambda: now[0]) as view:
        for step in range(45):  # 11 s
            now[0] = step / 4
            view(live_of(elapsed_s=20))
    lines = file.getvalue().splitlines()
    assert len(lines) == 2
    assert re.match(
        r"6/s · 20 s · 100 sent · 3 in flight · 87 ok · \d+ failed · [\d,]+ tokens \([\d.,]+/s\) · TTFT \d", lines[0]
    )
    assert "\x1b" not in file.getvalue()


def test_tokens_count_as_they_arrive_and_not_only_when_a_request_ends():
    view, live = LiveView(None, console=Console(file=io.StringIO())), Live(workload().draw(0, num_requests=9))
    for second, chunks in enumerate((0, 0, 150, 300, 450)):
        live.start_at = time.monotonic() - second
        live.workers[0] = WorkerProgress(sent=9, running=9, chunks=chunks, chunks_in_flight=chunks)
        view(live)
    assert "9 in flight · 0 ok · 0 failed · 450 tokens (112/s)" in view.line(live)


def test_an_interrupted_load_says_how_many_requests_had_not_ended():
    whole = load(requests=100)
    cut = [replace_sample(s, outcome=Outcome.ABORTED, ended_s=20.0) if s.index >= 80 else s for s in whole.samples]
    one = point(replace(whole, samples=tuple(cut), stopped=True, interrupted=True, wall_s=20.0))
    text = shown(replace(report(one), interrupted=True), 200)
    assert "20 requests had not ended" in text
    assert "interrupted after 20 s with 20 of 100 requests in flight" in text
    assert "Latencies are those of the requests that had ended: they favour short ones." in text
    assert f"{one.summary.outcomes['aborted']} in flight when the load was stopped" in text
    assert (one.in_flight, one.errors, one.verdict) == (20, (), "INVALID")


def test_a_second_load_begins_anew():
    view = LiveView(None, console=Console(file=io.StringIO()))
    view(live_of(20))
    fresh = Live(workload().draw(0, num_requests=5), start_at=time.monotonic())
    view(fresh)
    assert "0 ok · 0 failed" in view.line(fresh)
    assert "TTFT –" in view.line(fresh)


def test_in_a_terminal_lines_fit_and_the_cursor_comes_back_after_ctrl_c():
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=60, color_system=None)

    def interrupted() -> None:
        with LiveView(LIMITS, label="x" * 99, console=console) as view:
            view(live_of(20))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    text = file.getvalue()
    assert text.startswith("\x1b[?25l")  # hidden
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    visible = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert max(map(len, re.split(r"[\r\n]", visible))) <= 60
