"""The server's log has a line of throughput while something is computed, and none while it is idle."""

from __future__ import annotations

import asyncio
import logging
import signal

import pytest

from powerband.metrics.prometheus import EngineMetrics
from powerband.server.throughput import log_throughput, throughput_line
from powerband.web.listening import stopping_text

STATS = {
    "num_running": 2,
    "num_waiting": 1,
    "cache": {"num_used": 1, "num_blocks": 8},
    "num_preemptions": 0,
    "prefix_queries": 200,
    "prefix_hits": 50,
}
IDLE = {**STATS, "num_running": 0, "num_waiting": 0}


def test_line_has_the_figures_that_vllm_shows() -> None:
    metrics = EngineMetrics("demo")
    before = metrics.figures()
    metrics.observe_first_tokens(1, ttft_s=0.1, prompt_tokens=100)
    metrics.observe_tokens(49, gap_s=0.1)
    metrics.update(STATS)
    assert throughput_line(before, metrics.figures(), 10.0) == (
        "Prompt throughput: 10.0 tokens/s, generation throughput: 5.0 tokens/s, running: 2 requests,"
        " waiting: 1 request, KV cache usage: 12.5%, prefix cache hit rate: 25.0%"
    )


def test_long_prefill_without_any_token_yet_is_activity_and_an_idle_server_is_none() -> None:
    metrics = EngineMetrics("demo")
    metrics.update(STATS)
    assert "running: 2 requests" in throughput_line(metrics.figures(), metrics.figures(), 10.0)
    metrics.update(IDLE)
    assert throughput_line(metrics.figures(), metrics.figures(), 10.0) == ""


def test_counts_that_begin_again_with_a_new_engine_are_no_negative_throughput() -> None:
    metrics = EngineMetrics("demo")
    metrics.update(STATS)
    before = metrics.figures()
    metrics.update({**STATS, "prefix_queries": 0, "prefix_hits": 0})
    assert "-" not in throughput_line(before, metrics.figures(), 10.0)


def test_lines_follow_the_activity(caplog: pytest.LogCaptureFixture) -> None:
    metrics = EngineMetrics("demo")

    async def lines_until(number: int) -> None:
        logging_task = asyncio.create_task(log_throughput(metrics, 0.01))
        while len(caplog.messages) < number:
            metrics.observe_tokens(1, gap_s=0.01)
            await asyncio.sleep(0)
        logging_task.cancel()

    with caplog.at_level(logging.INFO, "powerband.server.throughput"):
        asyncio.run(asyncio.wait_for(lines_until(3), 20))
    assert all("generation throughput" in line for line in caplog.messages)


@pytest.mark.parametrize(
    ("number", "active", "text"),
    [
        (signal.SIGINT, 0, "Stopping after Ctrl-C (SIGINT): no request is running."),
        (signal.SIGTERM, 1, "Stopping after SIGTERM: 1 running request has 30 s to finish."),
        (signal.SIGTERM, 7, "7 running requests have 30 s to finish. A second signal stops at once."),
    ],
)
def test_server_says_why_it_stops(number: signal.Signals, active: int, text: str) -> None:
    assert text in stopping_text(number, active, 30.0)
