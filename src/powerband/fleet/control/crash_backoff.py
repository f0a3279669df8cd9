"""What is remembered about replicas that die: when to try again, and when to give a new release up.

The first replacement starts at once. Where one keeps dying, the pauses double: up to half a minute where it dies before
it is ready, up to a few seconds where it dies after that, since each one serves for a while. One that has lived for a
minute ends the series.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from powerband.fleet.targets.base import ExitedInstance

INITIAL_BACKOFF_S, MAX_BACKOFF_S = 1.0, 30.0
MAX_BACKOFF_AFTER_READY_S = 2.0
STABLE_AFTER_S = 60.0
MAX_FAILED_STARTS = 2  # a port may be taken in between, once
# Our engine says so by its exit code: the same command would fail again.
PERMANENT_EXIT_CODES = (2, 3)


@dataclass(slots=True)
class _CrashHistory:
    """Deaths in a row, of replicas of one revision."""

    deaths: int = 0
    failed_starts: int = 0
    next_try_s: float = 0.0
    last: ExitedInstance | None = None
    hopeless: bool = False


@dataclass(slots=True)
class CrashBackoff:
    """By revision. Times on one clock, in seconds."""

    _series: dict[str, _CrashHistory] = field(default_factory=dict)

    def note(self, revision: str, gone: ExitedInstance, now_s: float, *, ready_for_s: float | None) -> None:
        """A replica died unasked. ready_for_s: since it was ready; None: it never was."""
        series = self._series.setdefault(revision, _CrashHistory())
        if ready_for_s is not None and ready_for_s >= STABLE_AFTER_S:
            series.deaths = 0
        series.deaths += 1
        series.last = gone
        if ready_for_s is None:
            series.failed_starts += 1
            series.hopeless = gone.exit_code in PERMANENT_EXIT_CODES
        max_pause_s = MAX_BACKOFF_S if ready_for_s is None else MAX_BACKOFF_AFTER_READY_S
        pause_s = 0.0 if series.deaths == 1 else min(INITIAL_BACKOFF_S * 2 ** min(series.deaths - 2, 16), max_pause_s)
        series.next_try_s = now_s + pause_s

    def became_ready(self, revision: str) -> None:
        if revision in self._series:
            self._series[revision].failed_starts = 0

    def try_anew(self) -> None:
        """Somebody changed what is desired: what failed before may work now."""
        self._series.clear()

    def held(self, now_s: float) -> set[str]:
        """Revisions of which none is to be started yet."""
        return {revision for revision, series in self._series.items() if now_s < series.next_try_s}

    def is_lost(self, revision: str) -> bool:
        """Whether a release that never was ready should be given up."""
        series = self._series.get(revision)
        return series is not None and (series.failed_starts >= MAX_FAILED_STARTS or series.hopeless)

    def last(self, revision: str) -> ExitedInstance | None:
        series = self._series.get(revision)
        return series.last if series is not None else None

    def told(self) -> list[str]:
        """A sentence for each revision whose replicas keep dying."""
        found = []
        for revision, series in self._series.items():
            if series.deaths > 1 and series.last is not None:
                last_line = series.last.log.strip().rpartition("\n")[2]
                found.append(
                    f"{revision} died {series.deaths} times in a row, last {series.last.id}: {last_line[:200]}"
                )
        return found
