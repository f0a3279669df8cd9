"""A service's controller as a process: `python -m powerband.fleet.control.controller_process NAME`.

It runs until the service is removed, or until it gets SIGTERM. The process that holds the lock is the controller; a
second one exits at once. However it exits, the instances keep running.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import uvloop

from powerband.errors import EnvironmentFault
from powerband.fleet.control.controller import Controller
from powerband.fleet.control.gateway_client import GatewayClient
from powerband.fleet.control.probes import HealthProber
from powerband.fleet.monitor.events import Events
from powerband.fleet.monitor.incidents import Incidents
from powerband.fleet.monitor.webhook import WebhookNotifier
from powerband.fleet.service.store import ServiceStore, lock
from powerband.fleet.targets.local import LocalTarget, last_lines
from powerband.fleet.targets.processes import EnvironmentTag, is_alive, session_leader_with
from powerband.gateway.accounts.accounts import Accounts, has_admin_key
from powerband.metrics.logging import set_up_logging

logger = logging.getLogger("powerband.fleet.control.controller_process")  # as a process it is __main__

CONTROLLER_TAG = "POWERBAND_CONTROLLER"  # in a controller's environment: the path of its lock
TICK_INTERVAL_S = 0.4
_START_TIMEOUT_S = 20.0
_HANG_CHECK_S = 2.0  # for a heartbeat of a controller that seems hung: the whole machine may have been suspended
_KILL_TIMEOUT_S = 5.0
_LOCK_TIMEOUT_S = 1.0  # a command that checks whether a controller is alive holds the lock for a moment


def ensure_controller(store: ServiceStore) -> bool:
    """Start a controller if none is alive, and wait until it is. Returns True if one was started.

    A hung controller is killed first; the next one recovers everything. Raises EnvironmentFault.
    """
    state = store.controller_state()
    if state == "alive" or (state == "hung" and not _kill_hung(store)):
        return False
    log = store.logs / "controller.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "powerband.fleet.control.controller_process", store.name],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, CONTROLLER_TAG: str(store.controller_lock)},
            start_new_session=True,
        )
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if store.controller_alive():
            return True
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise EnvironmentFault(f"The controller of {store.name} did not start.\n{last_lines(log)}", hint=f"Its log: {log}")


def _kill_hung(store: ServiceStore) -> bool:
    """Kill the controller that holds the lock and sends no heartbeat. False: it is alive after all. Raises
    EnvironmentFault.
    """
    heartbeat, deadline_s = store.last_heartbeat(), time.monotonic() + _HANG_CHECK_S
    while time.monotonic() < deadline_s:
        if store.last_heartbeat() != heartbeat or store.controller_state() == "none":
            return store.controller_state() == "none"
        time.sleep(0.05)
    found = session_leader_with(EnvironmentTag(CONTROLLER_TAG, str(store.controller_lock)))
    deadline_s = time.monotonic() + _KILL_TIMEOUT_S
    while found is not None and time.monotonic() < deadline_s:
        os.kill(found.pid, signal.SIGKILL)
        time.sleep(0.05)
        if not is_alive(found):
            return True
    raise EnvironmentFault(
        f"The controller of {store.name} is hung and could not be killed.",
        hint=f"'fuser {store.controller_lock}' shows its process: end it with 'kill -9', then try again.",
    )


def main() -> int:
    store = ServiceStore.named(sys.argv[1])
    set_up_logging("info", "text")
    try:
        with lock(store.controller_lock, wait_s=_LOCK_TIMEOUT_S) as descriptor:
            os.utime(descriptor)
            return uvloop.run(_run(store, lambda: os.utime(descriptor)))
    except BlockingIOError:
        logger.info("Another controller of %s is alive.", store.name)
        return 0


async def _run(store: ServiceStore, send_heartbeat: Callable[[], None]) -> int:
    """send_heartbeat: sets the modification time of the lock's file, which needs no space on the disk."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    prober, gateway = HealthProber(), GatewayClient(_admin_key(store))
    notifier = WebhookNotifier(store.name)
    incidents = Incidents(store.incidents, notifier.notify)
    events = Events(store.events)
    controller = Controller(store, LocalTarget(store.path), prober, gateway, incidents=incidents, events=events)
    controller.recover()
    polling = asyncio.create_task(gateway.poll_forever(), name="gateway")
    logger.info("The controller of %s is running.", store.name)
    try:
        while not stop.is_set() and _tick(controller):
            send_heartbeat()
            notifier.set_url(controller.webhook)
            try:
                await asyncio.wait_for(stop.wait(), TICK_INTERVAL_S)
            except TimeoutError:
                continue
    finally:
        polling.cancel()
        await asyncio.gather(polling, return_exceptions=True)
        await prober.close()
        notifier.close()
    logger.info("The controller of %s exits.", store.name)
    return 0


def _tick(controller: Controller) -> bool:
    """Log errors of a tick and continue: a bug or a full disk must not leave a service without its controller."""
    try:
        return controller.tick()
    except Exception:
        logger.exception("A tick failed; the controller continues with the next one.")
        return True


def _admin_key(store: ServiceStore) -> str:
    """The gateway's first admin key, created before the gateway's first start."""
    store = store.gateway_store
    if not has_admin_key(store.admin_key):
        accounts = Accounts.open(store.database)
        try:
            accounts.make_admin_key(store.admin_key, "fleet")
        finally:
            accounts.close()
    return store.read_admin_key()


if __name__ == "__main__":
    sys.exit(main())
