"""`python -m powerband.fleet.controller_process NAME`: a service's controller, until it is removed or told to end.

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
from powerband.fleet.controller import Controller
from powerband.fleet.front import FrontLink
from powerband.fleet.local import LocalTarget, last_lines
from powerband.fleet.probes import Probes
from powerband.fleet.processes import Mark, is_alive, session_leader_with
from powerband.fleet.state import ServiceFolder, lock
from powerband.fleet.watch.incidents import Incidents
from powerband.fleet.watching import Messenger
from powerband.gateway.accounts.books import Books, has_admin_key
from powerband.metrics.logging import set_up_logging

logger = logging.getLogger("powerband.fleet.controller_process")  # not __main__, as which it runs

MARK = "POWERBAND_CONTROLLER"  # in a controller's environment: the path of its lock
TICK_S = 0.4
_START_S = 20.0
_HUNG_S = 2.0  # that a silent controller is watched for a heartbeat: the whole machine may have slept
_KILL_S = 5.0
_LOCK_S = 1.0  # who only asks whether a controller is alive has its lock for a moment


def ensure_controller(folder: ServiceFolder) -> bool:
    """Start one where none is alive, and wait until it is. True: one was started. One that hangs is killed first: it
    keeps nothing that the next one does not find. Raises EnvironmentFault.
    """
    state = folder.controller_state()
    if state == "alive" or (state == "hung" and not _end_hung(folder)):
        return False
    log = folder.logs / "controller.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "powerband.fleet.controller_process", folder.name],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, MARK: str(folder.controller_lock)},
            start_new_session=True,
        )
    deadline_s = time.monotonic() + _START_S
    while time.monotonic() < deadline_s:
        if folder.controller_alive():
            return True
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise EnvironmentFault(f"The controller of {folder.name} did not start.\n{last_lines(log)}", hint=f"Its log: {log}")


def _end_hung(folder: ServiceFolder) -> bool:
    """Kill the controller that holds the lock and is silent; False: it was not hung. Raises EnvironmentFault."""
    beat, watched_until_s = folder.controller_beat(), time.monotonic() + _HUNG_S
    while time.monotonic() < watched_until_s:
        if folder.controller_beat() != beat or folder.controller_state() == "none":
            return folder.controller_state() == "none"
        time.sleep(0.05)
    found = session_leader_with(Mark(MARK, str(folder.controller_lock)))
    deadline_s = time.monotonic() + _KILL_S
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
    folder = ServiceFolder.of(sys.argv[1])
    set_up_logging("info", "text")
    try:
        with lock(folder.controller_lock, wait_s=_LOCK_S) as descriptor:
            os.utime(descriptor)
            return uvloop.run(_run(folder, lambda: os.utime(descriptor)))
    except BlockingIOError:
        logger.info("Another controller of %s is alive.", folder.name)
        return 0


async def _run(folder: ServiceFolder, beat: Callable[[], None]) -> int:
    """beat: sends a heartbeat, by the time of the lock's file: that needs no room on the disk."""
    ending = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ending.set)
    probes, front = Probes(), FrontLink(_admin_key(folder))
    messenger = Messenger(folder.name)
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
                await asyncio.wait_for(ending.wait(), TICK_S)
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


def _admin_key(folder: ServiceFolder) -> str:
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
