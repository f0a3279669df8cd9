"""Incidents: what is wrong, since when, why, and what to do or what was done. Kept in one file that survives restarts.

An incident opens with a finding, stays while it is found again, and closes when it was not for CLOSE_AFTER_S. One that
comes back within REOPEN_WITHIN_S is the same one: who is called should be called once.
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
_UPDATE_INTERVAL_S = 10.0  # evidence moves all the time; the file need not
_MAX_CLOSED = 500
_MAX_ACTIONS = 20

Kind = Literal["promise", "replica", "model", "host", "gateway"]
# What is behind it, likeliest first where several are found.
Cause = Literal[
    "load", "hang", "errors", "down", "slow_replica", "leak", "cache", "mix", "memory", "host", "model", "unknown"
]
CAUSES: tuple[Cause, ...] = get_args(Cause)
ActionKind = Literal["none", "add_replica", "eject_replica", "restart_replica", "replan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """subject: SERVICE, or a replica's id. what: a sentence. evidence: figures by name. advice: a sentence."""

    kind: Kind
    subject: str
    cause: Cause
    what: str
    evidence: Mapping[str, float | str] = field(default_factory=dict)
    action: ActionKind = "none"
    advice: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """Times are time.time(). done: what was executed, each with its time. culprit: the replica behind it, or ''."""

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
    done: tuple[str, ...] = ()

    @property
    def is_open(self) -> bool:
        return self.closed_at is None


Change = Literal["opened", "closed"]


class Incidents:
    """path: None: kept in memory only. tell: called with what opened or closed; it must not block.

    One process writes; others read with `read_incidents`. A disk that is full costs the file, never the watching.
    """

    def __init__(self, path: Path | None = None, tell: Callable[[Change, Incident], None] | None = None) -> None:
        self._path = path
        self._tell = tell
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
        """Take over what is found now; returns what opened by it."""
        wanted = {(finding.kind, finding.subject): finding for finding in findings}
        for place, incident in enumerate(self._all):
            if not incident.is_open:
                continue
            finding = wanted.pop((incident.kind, incident.subject), None)
            if finding is not None:
                self._all[place] = _updated(incident, finding, now_s)
            elif now_s - incident.seen_at >= CLOSE_AFTER_S:
                self._all[place] = replace(incident, closed_at=now_s)
                self._changed("closed", self._all[place])
        opened = [self._open(now_s, finding) for finding in wanted.values()]
        if not self._is_written or (self.open and now_s - self._written_s >= _UPDATE_INTERVAL_S):
            self._write(now_s)
        return opened

    def note(self, incident_id: str, done: str) -> None:
        """Something was done about an incident."""
        for place, incident in enumerate(self._all):
            if incident.id == incident_id:
                self._all[place] = replace(incident, done=(*incident.done, done)[-_MAX_ACTIONS:])
                self._is_written = False

    def _open(self, now_s: float, finding: Finding) -> Incident:
        for place, before in enumerate(self._all):
            is_same = (before.kind, before.subject) == (finding.kind, finding.subject)
            if is_same and before.closed_at is not None and now_s - before.closed_at <= REOPEN_WITHIN_S:
                incident = _updated(replace(before, closed_at=None), finding, now_s)
                del self._all[place]
                break
        else:
            incident = _updated(
                Incident(
                    id=self._new_id(now_s),
                    kind=finding.kind,
                    subject=finding.subject,
                    cause=finding.cause,
                    what=finding.what,
                    opened_at=now_s,
                    seen_at=now_s,
                ),
                finding,
                now_s,
            )
        self._all.append(incident)
        closed = [one for one in self._all if not one.is_open]
        if len(closed) > _MAX_CLOSED:
            self._all.remove(closed[0])
        self._changed("opened", incident)
        return incident

    def _new_id(self, now_s: float) -> str:
        """inc-<hex of the millisecond>, later ones greater."""
        number = int(now_s * 1000)
        taken = {incident.id for incident in self._all}
        while f"inc-{number:x}" in taken:
            number += 1
        return f"inc-{number:x}"

    def _changed(self, change: Change, incident: Incident) -> None:
        self._is_written = False
        logger.log(
            logging.WARNING if change == "opened" else logging.INFO,
            "Incident %s %s: %s",
            incident.id,
            change,
            incident.what,
            extra={"incident": incident.id, "kind": incident.kind, "cause": incident.cause},
        )
        if self._tell is not None:
            self._tell(change, incident)

    def _write(self, now_s: float) -> None:
        self._written_s = now_s
        if self._path is None:
            self._is_written = True
            return
        try:
            write_atomically(self._path, msgspec.json.encode(self._all), durable=False)
            self._is_written = True
        except OSError as problem:
            logger.warning("Incidents cannot be written to %s: %s.", self._path, problem.strerror)


def read_incidents(path: Path) -> tuple[Incident, ...]:
    """Oldest first. A file that is not there, or none of ours, holds none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=tuple[Incident, ...])
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, RecursionError) as problem:
        logger.warning("Incidents cannot be read from %s: %s.", path, problem)
        return ()


def _updated(incident: Incident, finding: Finding, now_s: float) -> Incident:
    """With what is found now. A cause stays until a likelier one is found: in the end, many things look strange."""
    keeps = CAUSES.index(finding.cause) > CAUSES.index(incident.cause)
    return replace(
        incident,
        seen_at=now_s,
        cause=incident.cause if keeps else finding.cause,
        what=incident.what if keeps else finding.what,
        evidence={**incident.evidence, **finding.evidence} if keeps else dict(finding.evidence),
        action=incident.action if keeps else finding.action,
        advice=incident.advice if keeps else finding.advice,
    )
