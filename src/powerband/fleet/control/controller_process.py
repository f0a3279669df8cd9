"""A service's controller, until the service is removed: `python -m powerband.fleet.control.controller_process NAME`.

Whoever holds the lock is the controller; a second one ends at once. Its end, however it comes, touches no member.
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
from powerband.fleet.control.monitoring import WebhookNotifier
from powerband.fleet.control.probes import HealthProber
from powerband.fleet.monitor.incidents import Incidents
from powerband.fleet.service.store import ServiceStore, lock
from powerband.fleet.targets.local import LocalTarget, last_lines
from powerband.fleet.targets.processes import EnvironmentTag, is_alive, session_leader_with
from powerband.gateway.accounts.books import Books, has_admin_key
from powerband.metrics.logging import set_up_logging

logger = logging.getLogger("powerband.fleet.control.controller_process")  # not __main__, as which it runs

CONTROLLER_TAG = "POWERBAND_CONTROLLER"  # in a controller's environment: the path of its lock
TICK_INTERVAL_S = 0.4
_START_TIMEOUT_S = 20.0
_HANG_CHECK_S = 2.0  # that a silent controller is watched for a heartbeat: the whole machine may have slept
_KILL_TIMEOUT_S = 5.0
_LOCK_TIMEOUT_S = 1.0  # who only asks whether a controller is alive has its lock for a moment


def ensure_controller(folder: ServiceStore) -> bool:
    """Start one where none is alive, and wait until it is. True: one was started. One that hangs is killed first: it
    keeps nothing that the next one does not find. Raises EnvironmentFault.
    """
    state = folder.controller_state()
    if state == "alive" or (state == "hung" and not _end_hung(folder)):
        return False
    log = folder.logs / "controller.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "powerband.fleet.control.controller_process", folder.name],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, CONTROLLER_TAG: str(folder.controller_lock)},
            start_new_session=True,
        )
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if folder.controller_alive():
            return True
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise EnvironmentFault(f"The controller of {folder.name} did not start.\n{last_lines(log)}", hint=f"Its log: {log}")


def _end_hung(folder: ServiceStore) -> bool:
    """Kill the controller that holds the lock and is silent; False: it was not hung. Raises EnvironmentFault."""
    beat, watched_until_s = folder.controller_beat(), time.monotonic() + _HANG_CHECK_S
    while time.monotonic() < watched_until_s:
        if folder.controller_beat() != beat or folder.controller_state() == "none":
            return folder.controller_state() == "none"
        time.sleep(0.05)
    found = session_leader_with(EnvironmentTag(CONTROLLER_TAG, str(folder.controller_lock)))
    deadline_s = time.monotonic() + _KILL_TIMEOUT_S
    while found is not None and time.monotonic() < deadline_s:
        os.kill(found.pid, signal.SIGKILL)
        time.sleep(0.05)
        if not is_alive(found):
            return True
    raise EnvironmentFault(
        f"The controller of {folder.name} hangs, and could not be ended.",
        hint=f"'fuser {folder.controller_lock}' shows its process: end it with 'kill -9', then try again.",
    )


def main() -> int:
    folder = ServiceStore.of(sys.argv[1])
    set_up_logging("info", "text")
    try:
        with lock(folder.controller_lock, wait_s=_LOCK_TIMEOUT_S) as descriptor:
            os.utime(descriptor)
            return uvloop.run(_run(folder, lambda: os.utime(descriptor)))
    except BlockingIOError:
        logger.info("Another controller of %s is alive.", folder.name)
        return 0


async def _run(folder: ServiceStore, beat: Callable[[], None]) -> int:
    """beat: sends a heartbeat, by the time of the lock's file: that needs no room on the disk."""
    ending = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ending.set)
    probes, front = HealthProber(), GatewayClient(_admin_key(folder))
    messenger = WebhookNotifier(folder.name)
    incidents = Incidents(folder.incidents, messenger.tell)
    controller = Controller(folder, LocalTarget(folder.path), probes, front, incidents=incidents)
    controller.adopt()
    talking = asyncio.create_task(front.keep_talking(), name="gateway")
    logger.info("The controller of %s is alive.", folder.name)
    try:
        while not ending.is_set() and _tick(controller):
            beat()
            messenger.turn_to(controller.webhook)
            try:
                await asyncio.wait_for(ending.wait(), TICK_INTERVAL_S)
            except TimeoutError:
                continue
    finally:
        talking.cancel()
        await asyncio.gather(talking, return_exceptions=True)
        await probes.close()
        messenger.close()
    logger.info("The controller of %s ends.", folder.name)
    return 0


def _tick(controller: Controller) -> bool:
    """A defect, or a full disk, must not leave a service without its controller."""
    try:
        return controller.tick()
    except Exception:
        logger.exception("A look at the service failed; the next one follows.")
        return True


def _admin_key(folder: ServiceStore) -> str:
    """The gateway's first admin key, made before its first start."""
    if not has_admin_key(folder.admin_key):
        books = Books.open(folder.database)
        try:
            books.make_admin_key(folder.admin_key, "fleet")
        finally:
            books.close()
    return folder.admin_key.read_text().strip()


if __name__ == "__main__":
    sys.exit(main())
