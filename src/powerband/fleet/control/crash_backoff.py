"""Crash-loop back-off: when a crashed replica is replaced, and when a new release is given up.

The first replacement starts at once. If replicas keep crashing, the delay doubles: up to half a minute for those that
crash before they are ready, up to a few seconds for those that crash later, because each of them serves for a while. A
replica that was ready for a minute resets the delay.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from powerband.fleet.targets.base import ExitedInstance

INITIAL_BACKOFF_S, MAX_BACKOFF_S = 1.0, 30.0
MAX_BACKOFF_AFTER_READY_S = 2.0
STABLE_AFTER_S = 60.0
MAX_FAILED_STARTS = 2  # a single failure may be bad luck, such as a port taken by another process
PERMANENT_EXIT_CODES = (2, 3)  # Powerband's engine reports a usage or environment error: a retry would fail again


@dataclass(slots=True)
class _CrashHistory:
    """Consecutive crashes of replicas of one revision."""

    crashes: int = 0
    failed_starts: int = 0
    next_start_s: float = 0.0
    last: ExitedInstance | None = None
    is_permanent: bool = False


@dataclass(slots=True)
class CrashBackoff:
    """The crashes of each revision. Times in seconds, on one clock."""

    _histories: dict[str, _CrashHistory] = field(default_factory=dict)

    def record_crash(self, revision: str, exited: ExitedInstance, now_s: float, *, ready_for_s: float | None) -> float:
        """Returns for how many seconds no other is started. ready_for_s: how long the instance had been ready; None: it
        never was.
        """
        history = self._histories.setdefault(revision, _CrashHistory())
        if ready_for_s is not None and ready_for_s >= STABLE_AFTER_S:
            history.crashes = 0
        history.crashes += 1
        history.last = exited
        if ready_for_s is None:
            history.failed_starts += 1
            history.is_permanent = exited.exit_code in PERMANENT_EXIT_CODES
        max_s = MAX_BACKOFF_S if ready_for_s is None else MAX_BACKOFF_AFTER_READY_S
        doublings = min(history.crashes - 2, 16)
        delay_s = 0.0 if doublings < 0 else min(INITIAL_BACKOFF_S * 2**doublings, max_s)
        history.next_start_s = now_s + delay_s
        return delay_s

    def record_ready(self, revision: str) -> None:
        if revision in self._histories:
            self._histories[revision].failed_starts = 0

    def reset(self) -> None:
        """The desired state has changed: what failed before may work now."""
        self._histories.clear()

    def backing_off(self, now_s: float) -> set[str]:
        """Revisions whose instances may not be started yet."""
        return {revision for revision, history in self._histories.items() if now_s < history.next_start_s}

    def is_failed(self, revision: str) -> bool:
        """Whether a release that never became ready should be given up."""
        history = self._histories.get(revision)
        return history is not None and (history.failed_starts >= MAX_FAILED_STARTS or history.is_permanent)

    def last_crash(self, revision: str) -> ExitedInstance | None:
        history = self._histories.get(revision)
        return history.last if history is not None else None

    def messages(self) -> list[str]:
        """One sentence for each revision that keeps crashing."""
        found = []
        for revision, history in self._histories.items():
            if history.crashes > 1 and history.last is not None:
                last = history.last
                found.append(f"{revision} crashed {history.crashes} times in a row, last {last.id}: {last.error_line}")
        return found
