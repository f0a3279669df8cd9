"""Shows the watcher what the controller sees, about once a second, and does what it suggests where that is allowed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from powerband.errors import PowerbandError
from powerband.fleet.control.gateway_client import GatewaySnapshot
from powerband.fleet.control.instance_specs import release_slo
from powerband.fleet.monitor.expected import Expectation
from powerband.fleet.monitor.incidents import Change, Incident
from powerband.fleet.monitor.monitor import Action, Monitor
from powerband.fleet.monitor.observation import Observation, read_host
from powerband.fleet.monitor.webhook import Webhook
from powerband.fleet.service.spec import Release
from powerband.gateway.request import Finished
from powerband.spec.plan import Prediction
from powerband.spec.yaml_codec import read_record

logger = logging.getLogger(__name__)

INTERVAL_S = 1.0
_MAX_SNAPSHOT_AGE_S = 5.0  # what the gateway said longer ago is no news


@dataclass(slots=True)
class MonitorDriver:
    """carry_out: does an action and says in a sentence what was done; raises PowerbandError where it cannot."""

    watcher: Monitor
    carry_out: Callable[[Action], str]
    _looked_s: float = -INTERVAL_S
    _finished: list[Finished] = field(default_factory=list)
    _release: Release | None = None

    def look(
        self,
        release: Release,
        finished: Sequence[Finished],
        heard: GatewaySnapshot | None,
        metrics: Mapping[str, str],
        *,
        auto: bool,
        now_s: float,
    ) -> None:
        """now_s: on time.monotonic(). auto: actions are carried out, not only suggested."""
        self._finished += finished
        if now_s - self._looked_s < INTERVAL_S:
            return
        self._looked_s = now_s
        if release is not self._release:
            self._release = release
            self.watcher.expect(expected_from(release))
        is_fresh = heard is not None and now_s - heard.at_s < _MAX_SNAPSHOT_AGE_S
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


class WebhookNotifier:
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


def expected_from(release: Release) -> Expectation:
    """What the release's plan promises, also where its trace is not here."""
    predicted = {
        name: read_record(Prediction, told, f"plan: predicted: {name}")
        for name, told in release.plan.get("predicted", {}).items()
    }
    return Expectation(slo=release_slo(release), rate=release.plan["promise"]["rate"], predicted=predicted)


def with_one_more(release: Release, loads: Mapping[int, int]) -> Release:
    """One more replica in the pool that has most to do for each of its own. loads: requests under way by pool."""
    most = max(range(len(release.pools)), key=lambda index: loads.get(index, 0) / release.pools[index].count)
    pools = tuple(
        replace(pool, count=pool.count + 1) if index == most else pool for index, pool in enumerate(release.pools)
    )
    return replace(release, pools=pools)
