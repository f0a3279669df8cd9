"""Events: what happened to a service's instances and when, newest last. Stored in one file that survives restarts.

Reasons are Kubernetes' words where it has one. An event that repeats itself is counted, not written again.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import msgspec

from powerband.files import write_atomically
from powerband.fleet.targets.base import ExitedInstance

logger = logging.getLogger(__name__)

MAX_EVENTS = 500
REPEAT_WITHIN_S = 3600.0  # a repetition after a longer pause is an event of its own
_MAX_LINE = 200  # characters of a log's last line

NormalReason = Literal["Deployed", "Scaled", "Ready", "Stopped", "Removed", "ControllerStarted"]
WarningReason = Literal[
    "Error", "OOMKilled", "Rebooted", "Killing", "Unhealthy", "BackOff", "FailedStart", "FailedRollout"
]
Reason = NormalReason | WarningReason


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Times are time.time()."""

    reason: str  # a Reason; other versions may have other ones
    subject: str  # the id of an instance, 'controller', or the service's name
    message: str
    type: str = "Normal"  # or "Warning"
    count: int = 1
    first_seen: float
    last_seen: float
    exit_code: int | None = None  # of a process; 128 + the signal's number when a signal ended it
    signal: str = ""  # that ended it, such as SIGKILL


@dataclass(slots=True)
class Events:
    """path: None: kept in memory only. One process writes the file; others use `read_events`."""

    path: Path | None = None
    all: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.path is not None:
            self.all = list(read_events(self.path))

    def record(
        self,
        reason: Reason,
        subject: str,
        message: str,
        *,
        exit_code: int | None = None,
        signal: str = "",
        same_for: str = "",
    ) -> None:
        """same_for: a prefix of subjects whose events with this reason and message are one event, the last's."""
        now_s = time.time()
        event = Event(
            reason=reason,
            subject=subject,
            message=message,
            type="Normal" if reason in get_args(NormalReason) else "Warning",
            first_seen=now_s,
            last_seen=now_s,
            exit_code=exit_code,
            signal=signal,
        )
        for index, before in enumerate(self.all):
            is_same_subject = before.subject == subject or (same_for and before.subject.startswith(same_for))
            is_same = (before.reason, before.message) == (reason, message) and is_same_subject
            if is_same and now_s - before.last_seen <= REPEAT_WITHIN_S:
                event = msgspec.structs.replace(event, count=before.count + 1, first_seen=before.first_seen)
                del self.all[index]
                break
        self.all = [*self.all, event][-MAX_EVENTS:]
        level = logging.INFO if event.type == "Normal" else logging.WARNING
        logger.log(level, "%s %s: %s", reason, subject, message, extra={"reason": reason, "subject": subject})
        self._write()

    def record_exit(self, exited: ExitedInstance, *, was_ready: bool) -> None:
        """An exit that was not asked for. Those of instances that do not become ready are counted as one event."""
        code = exited.exit_code
        number = -code if code is not None and code < 0 else 0
        name = signal.Signals(number).name if number in signal.valid_signals() and number else ""
        reason: Reason = "Error"
        if exited.after_reboot:
            reason, how = "Rebooted", "the machine was restarted"
        elif exited.oom_killed:
            reason, how = "OOMKilled", "killed by the kernel: out of memory"
        elif number:
            how = f"killed by {name or f'signal {number}'}"
        elif code is not None:
            how = f"exit code {code}"
        else:
            how = "exited; an earlier controller had started it, so the exit code is not known"
        if not was_ready:
            how += ", before it was ready"
        last_line = exited.log.strip().rpartition("\n")[2][:_MAX_LINE]
        self.record(
            reason,
            exited.id,
            f"{how}: {last_line}" if last_line and reason == "Error" and not number else how,
            exit_code=128 + number if number else code,
            signal=name,
            same_for="" if was_ready else exited.id.rstrip("0123456789"),
        )

    def _write(self) -> None:
        if self.path is None:
            return
        try:
            write_atomically(self.path, msgspec.json.encode(self.all), durable=False)
        except OSError as error:  # a full disk costs the file; the log has the event
            logger.warning("Events cannot be written to %s: %s.", self.path, error.strerror)


def read_events(path: Path) -> Sequence[Event]:
    """Oldest first. Empty for a missing or damaged file."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=tuple[Event, ...])
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("Events cannot be read from %s: %s.", path, error)
        return ()
