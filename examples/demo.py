"""What `make demo` runs, the whole loop on the demo model: measure this machine, plan two replicas for it, deploy them,
prove the promise, stream an answer, keep serving until Ctrl-C.

Everything it does, a user can do by hand; it prints the commands. A plan would choose one replica for so light a load:
the demo asks for two (--replicas 2), each with half of the cores.
"""

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from powerband.spec.hardware.device import detect_cpu

SERVICE = "demo"
FOLDER = Path("build/demo")
MEASURING_S = 8  # of steps; all in all about a minute on two cores
LOAD = ("--prompt-tokens", "32-160", "--output-tokens", "16-64", "--rate", "3")
SLO = "ttft=500ms@p95,tpot=40ms@p95"
VERIFY_S = 40
CHAT = Path(__file__).with_name("chat.py")
INTERRUPTED = 130


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--once", action="store_true", help="remove the service after the answer")
    parser.add_argument("--port", type=int, default=None, help="of the gateway; default: 8000, or a free one")
    arguments = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(INTERRUPTED))  # so that the service is removed then, too

    FOLDER.mkdir(parents=True, exist_ok=True)
    profile, plan = FOLDER / "local.yaml", FOLDER / "plan.yaml"
    os.environ["POWERBAND_DEVICE_PROFILE"] = str(profile.absolute())  # beside the user's own measurement, not over it
    cores = detect_cpu().cores
    replicas = min(2, cores)
    port = ("--port", str(arguments.port)) if arguments.port else ()
    began_s = time.monotonic()
    try:
        if profile.exists():
            say(f"· this machine was measured before: {profile}")
        else:
            half = str(max(cores // 2, 1))
            run("calibrate", "demo", "--device", "cpu", "--threads", half, "--seconds", str(MEASURING_S), "--force")
        run("plan", "demo", *LOAD, "--slo", SLO, "--replicas", str(replicas), "--engine", "powerband", "-o", str(plan))
        run("deploy", str(plan), "--name", SERVICE, *port, "--verify", "--verify-seconds", str(VERIFY_S))
        url = gateway_url()
        say(f"\n$ python examples/chat.py --url {url}")
        subprocess.run([sys.executable, str(CHAT), "--url", url], check=True)
        say(f"\nFrom nothing to an answer in {time.monotonic() - began_s:.0f} s.")
        if not arguments.once:
            say(f"The demo model is served at {url}/v1 until you press Ctrl-C. In another terminal: powerband status")
            threading.Event().wait()
    except subprocess.CalledProcessError as error:
        return error.returncode
    except KeyboardInterrupt:
        print(file=sys.stderr)
    finally:
        remove()
    return 0


def run(*command: str) -> None:
    say(f"\n$ powerband {' '.join(command)}")
    subprocess.run([sys.executable, "-m", "powerband", *command], check=True)


def gateway_url() -> str:
    from powerband.fleet.service.store import endpoint

    return endpoint(SERVICE)[0]


def remove() -> None:
    """Where nothing was deployed, there is nothing to remove."""
    from powerband.fleet.service.store import services

    if any(folder.name == SERVICE for folder in services()):
        say(f"\n$ powerband remove {SERVICE}")
        subprocess.run([sys.executable, "-m", "powerband", "remove", SERVICE], check=False, process_group=0)


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
