"""Incidents: what is wrong, since when, the likely cause, and what to do. Stored in one file that survives restarts.

An incident opens with a finding, stays open while the finding is repeated, and closes CLOSE_AFTER_S after the last one.
A finding that returns within REOPEN_WITHIN_S reopens the same incident, which avoids a second notification.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

import msgspec

from powerband.files import write_atomically

logger = logging.getLogger(__name__)

SERVICE = "service"
CLOSE_AFTER_S = 30.0
REOPEN_WITHIN_S = 60.0
_WRITE_INTERVAL_S = 10.0  # while only the evidence changes
_MAX_CLOSED = 500
_MAX_ACTIONS = 20

Kind = Literal["promise", "replica", "model", "host", "gateway"]
# In order of likelihood: if several are found, the first one counts.
Cause = Literal[
    "load", "hang", "errors", "down", "slow_replica", "leak", "cache", "mix", "memory", "host", "model", "unknown"
]
CAUSES: tuple[Cause, ...] = get_args(Cause)
ActionKind = Literal["none", "add_replica", "eject_replica", "restart_replica", "replan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a check found. what, advice: one sentence each."""

    kind: Kind
    subject: str  # SERVICE, or a replica's id
    cause: Cause
    what: str
    evidence: Mapping[str, float | str] = field(default_factory=dict)
    action: ActionKind = "none"
    advice: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """Times are time.time()."""

    id: str
    kind: Kind
    subject: str
    cause: Cause
    what: str
    opened_at: float
    seen_at: float
    closed_at: float | None = None
    evidence: dict[str, float | str] = field(default_factory=dict)
    action: ActionKind = "none"
    advice: str = ""
    done: tuple[str, ...] = ()  # actions that were carried out, one sentence each

    @property
    def is_open(self) -> bool:
        return self.closed_at is None


Change = Literal["opened", "closed"]


class Incidents:
    """path: None: kept in memory only. on_change: called when an incident opens or closes; it must not block.

    One process writes the file; others use `read_incidents`. A full disk costs the file, but monitoring goes on.
    """

    def __init__(self, path: Path | None = None, on_change: Callable[[Change, Incident], None] | None = None) -> None:
        self._path = path
        self._on_change = on_change
        self._all: list[Incident] = list(read_incidents(path)) if path else []
        self._written_s = 0.0
        self._is_written = True

    @property
    def open(self) -> tuple[Incident, ...]:
        return tuple(incident for incident in self._all if incident.is_open)

    @property
    def all(self) -> tuple[Incident, ...]:
        """Oldest first."""
        return tuple(self._all)

    def update(self, now_s: float, findings: Iterable[Finding]) -> list[Incident]:
        """Open, update and close incidents according to the current findings. Returns those that were opened."""
        current = {(finding.kind, finding.subject): finding for finding in findings}
        for index, incident in enumerate(self._all):
            if not incident.is_open:
                continue
            finding = current.pop((incident.kind, incident.subject), None)
            if finding is not None:
                self._all[index] = _updated(incident, finding, now_s)
            elif now_s - incident.seen_at >= CLOSE_AFTER_S:
                self._all[index] = replace(incident, closed_at=now_s)
                self._report("closed", self._all[index])
        opened = [self._open(now_s, finding) for finding in current.values()]
        if not self._is_written or (self.open and now_s - self._written_s >= _WRITE_INTERVAL_S):
            self._write(now_s)
        return opened

    def record_action(self, incident_id: str, outcome: str) -> None:
        """Add a sentence on what was done about an incident."""
        for index, incident in enumerate(self._all):
            if incident.id == incident_id:
                self._all[index] = replace(incident, done=(*incident.done, outcome)[-_MAX_ACTIONS:])
                self._is_written = False

    def _open(self, now_s: float, finding: Finding) -> Incident:
        for index, before in enumerate(self._all):
            is_same = (before.kind, before.subject) == (finding.kind, finding.subject)
            if is_same and before.closed_at is not None and now_s - before.closed_at <= REOPEN_WITHIN_S:
                incident = _updated(replace(before, closed_at=None), finding, now_s)
                del self._all[index]
                break
        else:
            new = Incident(
                id=self._new_id(now_s),
                kind=finding.kind,
                subject=finding.subject,
                cause=finding.cause,
                what=finding.what,
                opened_at=now_s,
                seen_at=now_s,
            )
            incident = _updated(new, finding, now_s)
        self._all.append(incident)
        closed = [one for one in self._all if not one.is_open]
        if len(closed) > _MAX_CLOSED:
            self._all.remove(closed[0])
        self._report("opened", incident)
        return incident

    def _new_id(self, now_s: float) -> str:
        """inc-<hex of the millisecond>: later ids are greater."""
        number = int(now_s * 1000)
        taken = {incident.id for incident in self._all}
        while f"inc-{number:x}" in taken:
            number += 1
        return f"inc-{number:x}"

    def _report(self, change: Change, incident: Incident) -> None:
        self._is_written = False
        logger.log(
            logging.WARNING if change == "opened" else logging.INFO,
            "Incident %s %s: %s",
            incident.id,
            change,
            incident.what,
            extra={"incident": incident.id, "kind": incident.kind, "cause": incident.cause},
        )
        if self._on_change is not None:
            self._on_change(change, incident)

    def _write(self, now_s: float) -> None:
        self._written_s = now_s
        if self._path is None:
            self._is_written = True
            return
        try:
            write_atomically(self._path, msgspec.json.encode(self._all), durable=False)
            self._is_written = True
        except OSError as error:
            logger.warning("Incidents cannot be written to %s: %s.", self._path, error.strerror)


def read_incidents(path: Path) -> tuple[Incident, ...]:
    """Oldest first. Empty for a missing or damaged file."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=tuple[Incident, ...])
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("Incidents cannot be read from %s: %s.", path, error)
        return ()


def _updated(incident: Incident, finding: Finding, now_s: float) -> Incident:
    """Keep the first cause unless a more likely one appears: as an incident drags on, secondary symptoms show up."""
    keeps_cause = CAUSES.index(finding.cause) > CAUSES.index(incident.cause)
    return replace(
        incident,
        seen_at=now_s,
        cause=incident.cause if keeps_cause else finding.cause,
        what=incident.what if keeps_cause else finding.what,
        evidence={**incident.evidence, **finding.evidence} if keeps_cause else dict(finding.evidence),
        action=incident.action if keeps_cause else finding.action,
        advice=incident.advice if keeps_cause else finding.advice,
    )
