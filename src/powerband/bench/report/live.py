"""How a load is going, on stderr: in a terminal a few lines that renew themselves, elsewhere a plain line now and then.

Latencies are known when a request ends: those of the last seconds are of the requests that ended in them. Tokens count
as they arrive: the chunks of requests in flight as one token each, until their usage is known.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live as Screen
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from powerband.bench.load import Live
from powerband.metrics.record import Outcome, percentile
from powerband.metrics.shown import digits, plain, share_text, time_text
from powerband.metrics.slo import slo_misses
from powerband.spec.slo import SLO

RECENT_S = 10.0
PLAIN_EVERY_S = 5.0


@dataclass(frozen=True, slots=True)
class RecentLoad:
    """Latencies of the requests that ended in the last RECENT_S; None: there were none."""

    output_tokens_per_s: float  # that arrived in the last RECENT_S
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    tpot_p50_s: float | None
    max_send_lag_s: float | None


@dataclass(frozen=True, slots=True)
class _CompletedRequest:
    """What is kept of a request for RECENT_S."""

    seen_s: float
    ttft_s: float | None
    tpot_s: float | None
    send_lag_s: float


class LiveView:
    """Give it to load.run_load as `watch`, within its `with`. One view may follow several loads, one after the other.

    label: what the load is called; may be changed between loads.
    """

    def __init__(
        self,
        slo: SLO | None,
        *,
        label: str = "",
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.label = label
        self._slo = slo
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._screen: Screen | None = None
        self._load: Live | None = None
        self._printed_s = clock()
        self._begin()

    def __enter__(self) -> LiveView:
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            # Without a thread of its own: it is drawn when called. What is printed on stderr meanwhile goes above.
            self._screen = Screen(console=self._console, auto_refresh=False, transient=True, redirect_stdout=False)
            self._screen.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._screen is not None:
            self._screen.stop()  # the cursor comes back and the lines go, also after Ctrl-C
            self._screen = None

    def __call__(self, live: Live) -> None:
        if live is not self._load:
            self._load = live
            self._begin()
        self._take(live)
        now_s = self._clock()
        if self._screen is not None:
            self._screen.update(self._drawn(live), refresh=True)
        elif now_s - self._printed_s >= PLAIN_EVERY_S:
            self._printed_s = now_s
            self._console.print(Text(self.line(live)), soft_wrap=True)

    def line(self, live: Live) -> str:
        """All of it in one line."""
        recent = self._recent()
        parts = [
            *([plain(self.label)] if self.label else []),
            _time_text(live),
            f"{live.sent:,} sent",
            f"{live.running:,} in flight",
            f"{self._ok:,} ok",
            f"{self._failed:,} failed",
            f"{self._token_counts[-1][1]:,} tokens ({digits(recent.output_tokens_per_s)}/s)",
            f"TTFT {time_text(recent.ttft_p50_s)} (p99 {time_text(recent.ttft_p99_s)})",
            f"TPOT {time_text(recent.tpot_p50_s)}",
            *([f"SLO kept {share_text(self._attainment())}"] if self._slo is not None else []),
            f"send lag up to {time_text(recent.max_send_lag_s)}",
        ]
        return " · ".join(parts)

    def _begin(self) -> None:
        self._taken = self._ok = self._failed = self._good = self._tokens = 0
        self._recently: deque[_CompletedRequest] = deque()
        self._token_counts: deque[tuple[float, int]] = deque([(0.0, 0)])  # (time, tokens so far)

    def _take(self, live: Live) -> None:
        """The samples that are new."""
        now_s = live.elapsed_s
        for sample in live.samples[self._taken :]:
            self._tokens += sample.output_tokens
            if sample.outcome is Outcome.ABORTED:
                continue
            record, is_ok = sample.record(), sample.outcome is Outcome.OK
            self._ok += is_ok
            self._failed += not is_ok
            self._good += self._slo is not None and not slo_misses(record, self._slo)
            times = (record.ttft_s, record.tpot_s) if is_ok else (None, None)
            self._recently.append(_CompletedRequest(now_s, *times, record.send_lag_s))
        self._taken = len(live.samples)
        while self._recently and self._recently[0].seen_s < now_s - RECENT_S:
            self._recently.popleft()
        self._token_counts.append((now_s, self._tokens + live.chunks_in_flight))
        while len(self._token_counts) > 2 and self._token_counts[1][0] <= now_s - RECENT_S:
            self._token_counts.popleft()

    def _recent(self) -> RecentLoad:
        ended = self._recently
        (then_s, then_tokens), (now_s, now_tokens) = self._token_counts[0], self._token_counts[-1]
        first_tokens = [one.ttft_s for one in ended if one.ttft_s is not None]
        per_token = [one.tpot_s for one in ended if one.tpot_s is not None]
        return RecentLoad(
            max(now_tokens - then_tokens, 0) / max(now_s - then_s, 1.0),
            percentile(first_tokens, 50) if first_tokens else None,
            percentile(first_tokens, 99) if first_tokens else None,
            percentile(per_token, 50) if per_token else None,
            max((one.send_lag_s for one in ended), default=None),
        )

    def _attainment(self) -> float | None:
        ended = self._ok + self._failed
        return self._good / ended if ended else None

    def _drawn(self, live: Live) -> Group:
        recent = self._recent()
        total, done = _progress(live, self._taken)
        head = Table.grid(padding=(0, 2))
        label = [Text(plain(self.label), style="bold", no_wrap=True, overflow="ellipsis")] if self.label else []
        head.add_row(*label, ProgressBar(total=total, completed=done, width=24), _time_text(live))
        of = f" of {live.schedule.num_requests:,}" if _is_counted(live) else ""
        failed = (f"{self._failed:,} failed", "red" if self._failed else "")
        kept = f"   SLO kept by {share_text(self._attainment())}" if self._slo is not None else ""
        late = f"   sent ≤ {time_text(recent.max_send_lag_s)} late"
        return Group(
            head,
            _text(f"{live.sent:,}{of} sent, {live.running:,} in flight, {self._ok:,} ok, ", failed, kept, late),
            _text(
                f"TTFT p50 {time_text(recent.ttft_p50_s)}, p99 {time_text(recent.ttft_p99_s)}",
                f"   TPOT {time_text(recent.tpot_p50_s)}   {digits(recent.output_tokens_per_s)} tokens/s   ",
                (f"last {RECENT_S:g} s", "dim"),
            ),
        )


def _text(*parts: str | tuple[str, str]) -> Text:
    text = Text.assemble(*parts)
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def _is_counted(live: Live) -> bool:
    """Whether a number of requests ends the load; otherwise it is the time."""
    return math.isinf(live.schedule.duration_s)


def _progress(live: Live, ended: int) -> tuple[float, float]:
    """(total, done), of requests or of seconds."""
    if _is_counted(live):
        return float(live.schedule.num_requests), float(ended)
    return live.schedule.duration_s, min(max(live.elapsed_s, 0.0), live.schedule.duration_s)


def _time_text(live: Live) -> str:
    elapsed = f"{max(live.elapsed_s, 0.0):.0f}"
    return f"{elapsed} s" if _is_counted(live) else f"{elapsed} of {live.schedule.duration_s:.0f} s"
