"""Shows the watcher what the controller sees, about once a second, and does what it suggests where that is allowed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from powerband.errors import PowerbandError
from powerband.fleet.front import Heard
from powerband.fleet.launching import slo_of
from powerband.fleet.state import Release
from powerband.fleet.watch.expected import Expected
from powerband.fleet.watch.incidents import Change, Incident
from powerband.fleet.watch.observation import Observation, read_host
from powerband.fleet.watch.watcher import Action, Watcher
from powerband.fleet.watch.webhook import Webhook
from powerband.gateway.request import Finished
from powerband.spec.plan import Prediction
from powerband.spec.yaml_codec import read_record

logger = logging.getLogger(__name__)

EVERY_S = 1.0
_FRESH_S = 5.0  # what the gateway said longer ago is no news


@dataclass(slots=True)
class Watch:
    """carry_out: does an action and says in a sentence what was done; raises PowerbandError where it cannot."""

    watcher: Watcher
    carry_out: Callable[[Action], str]
    _looked_s: float = -EVERY_S
    _finished: list[Finished] = field(default_factory=list)
    _release: Release | None = None

    def look(
        self,
        release: Release,
        finished: Sequence[Finished],
        heard: Heard | None,
        metrics: Mapping[str, str],
        *,
        auto: bool,
        now_s: float,
    ) -> None:
        """now_s: on time.monotonic(). auto: actions are carried out, not only suggested."""
        self._finished += finished
        if now_s - self._looked_s < EVERY_S:
            return
        self._looked_s = now_s
        if release is not self._release:
            self._release = release
            self.watcher.expect(expected_of(release))
        is_fresh = heard is not None and now_s - heard.at_s < _FRESH_S
        seen = Observation(
            now_s=time.time(),
            clock_s=now_s,
            finished=tuple(self._finished),
            pools=heard.pools if heard is not None and is_fresh else None,
            metrics=metrics,
            host=read_host(),
        )
        self._finished = []
        for action in self.watcher.observe(seen):
            if auto and action.kind != "replan":
                self._do(action)

    def _do(self, action: Action) -> None:
        try:
            done = self.carry_out(action)
        except PowerbandError as problem:
            done = f"could not {action.kind.replace('_', ' ')}: {problem.message}"
        logger.info("%s: %s: %s", action.incident, action.why, done)
        self.watcher.done(action, done)

    def told(self) -> tuple[str, ...]:
        """Each open incident in a sentence."""
        return tuple(f"{one.id} {one.what} {one.advice}".strip() for one in self.watcher.incidents.open)

    def report(self) -> dict[str, Any]:
        return self.watcher.report()


class Messenger:
    """Tells a webhook of incidents, where there is one. service: its name."""

    def __init__(self, service: str) -> None:
        self._service = service
        self._url = ""
        self._webhook: Webhook | None = None

    def turn_to(self, url: str) -> None:
        """'': nobody. Waits a moment for what the one before still has to tell."""
        if url == self._url:
            return
        self.close()
        self._url = url
        self._webhook = Webhook(url, service=self._service) if url else None

    def tell(self, change: Change, incident: Incident) -> None:
        if self._webhook is not None:
            self._webhook.tell(change, incident)

    def close(self) -> None:
        if self._webhook is not None:
            self._webhook.close()
        self._webhook, self._url = None, ""


def expected_of(release: Release) -> Expected:
    """What the release's plan promises, also where its trace is not here."""
    predicted = {
        name: read_record(Prediction, told, f"plan: predicted: {name}")
        for name, told in release.plan.get("predicted", {}).items()
    }
    return Expected(slo=slo_of(release), rate=release.plan["promise"]["rate"], predicted=predicted)


def with_one_more(release: Release, loads: Mapping[int, int]) -> Release:
    """One more replica in the pool that has most to do for each of its own. loads: requests under way by pool."""
    most = max(range(len(release.pools)), key=lambda index: loads.get(index, 0) / release.pools[index].count)
    pools = tuple(
        replace(pool, count=pool.count + 1) if index == most else pool for index, pool in enumerate(release.pools)
    )
    return replace(release, pools=pools)
