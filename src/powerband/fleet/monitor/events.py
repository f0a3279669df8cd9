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
from powerband.fleet.targets.base import ExitedInstance, shown_name

logger = logging.getLogger(__name__)

MAX_EVENTS = 500
REPEAT_WITHIN_S = 3600.0  # a repetition after a longer pause is an event of its own

NormalReason = Literal[
    "Deployed", "Scaled", "Cordoned", "Uncordoned", "Ready", "Stopped", "Removed", "ControllerStarted"
]
WarningReason = Literal[
    "Error",
    "OOMKilled",
    "Rebooted",
    "EngineRestarted",
    "Killing",
    "Unhealthy",
    "BackOff",
    "FailedStart",
    "FailedRollout",
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
    ) -> Event:
        """same_for: a prefix of subjects whose events with this reason and message are one event, the last's."""
        now_s, subject = time.time(), shown_name(subject)
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
        return event

    def record_exit(self, exited: ExitedInstance, *, was_ready: bool, was_asked: bool = False) -> Event:
        """Exits of instances that do not become ready are counted as one event."""
        reason, message, signal_name = _exit(exited)
        if was_asked:
            reason = "Stopped"
        elif not was_ready:
            message += ", before it was ready"
        if reason == "Error" and not signal_name and exited.error_line:
            message += f": {exited.error_line}"
        code = exited.exit_code
        return self.record(
            reason,
            exited.id,
            message,
            exit_code=128 - code if code is not None and code < 0 else code,
            signal=signal_name,
            same_for="" if was_ready or was_asked else shown_name(exited.id).rstrip("0123456789"),
        )

    def _write(self) -> None:
        if self.path is None:
            return
        try:
            write_atomically(self.path, msgspec.json.encode(self.all), durable=False)
        except OSError as error:  # a full disk costs the file; the log has the event
            logger.warning("Events cannot be written to %s: %s.", self.path, error.strerror)


def _exit(exited: ExitedInstance) -> tuple[Reason, str, str]:
    """The reason, the message, and the name of the signal that ended it, '' without one."""
    code = exited.exit_code
    name = ""
    if code is not None and code < 0:
        name = signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
    if exited.after_reboot:
        return "Rebooted", "the machine was restarted", name
    if exited.oom_killed:
        return "OOMKilled", "killed by the kernel: out of memory", name
    if name:
        return "Error", f"killed by {name} (exit code {128 - (code or 0)})", name
    if code is None:
        return "Error", "exited while another controller was there, so the exit code is not known", name
    return "Error", f"exit code {code}", name


def read_events(path: Path) -> Sequence[Event]:
    """Oldest first. Empty for a missing or damaged file."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=tuple[Event, ...])
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("Events cannot be read from %s: %s.", path, error)
        return ()
