"""What `make demo` runs: serve the demo model, wait until it is ready, stream one answer, keep serving until Ctrl-C.

Everything it does, a user can do by hand; it prints the commands. Standard library only.
"""

import argparse
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

HOST = "127.0.0.1"
DEFAULT_PORT = 8000
READY_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 30.0
CHAT = Path(__file__).with_name("chat.py")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--once", action="store_true", help="stop the server after the answer")
    parser.add_argument("--port", type=int, default=None, help="default: 8000, or a free one when that is taken")
    arguments = parser.parse_args()
    port = arguments.port or free_port()
    url = f"http://{HOST}:{port}"

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(130))  # so that the server is stopped then, too
    command = [sys.executable, "-m", "powerband", "serve", "demo", "--port", str(port)]
    print(f"$ powerband serve demo --port {port}", flush=True)
    server = subprocess.Popen(command, process_group=0)  # Ctrl-C is for this script, which then asks the server to end
    try:
        if not wait_until_ready(server, url):
            return server.returncode or 4
        print(f"\n$ python examples/chat.py --url {url}", flush=True)
        subprocess.run([sys.executable, str(CHAT), "--url", url], check=True)
        if not arguments.once:
            print(f"\nThe demo model is served at {url}/v1 until you press Ctrl-C.", flush=True)
            return server.wait()
    except subprocess.CalledProcessError as error:
        return error.returncode
    except KeyboardInterrupt:
        print(file=sys.stderr)
    finally:
        stop(server)
    return 0


def free_port() -> int:
    """The default port, or one that the system says is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, DEFAULT_PORT))
        except OSError:
            with socket.socket() as other:
                other.bind((HOST, 0))
                port: int = other.getsockname()[1]
            print(f"Port {DEFAULT_PORT} is taken, so this uses {port}.")
            return port
    return DEFAULT_PORT


def wait_until_ready(server: subprocess.Popen[bytes], url: str) -> bool:
    """True once /readyz answers 200; False when the server ended or never became ready."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=2):
                return True
        except OSError:
            time.sleep(0.1)
    if server.poll() is None:
        print(f"error: the server was not ready after {READY_TIMEOUT_S:.0f} s", file=sys.stderr)
    return False


def stop(server: subprocess.Popen[bytes]) -> None:
    """Ask the server to drain and end; insist when it does not, or when Ctrl-C comes again."""
    if server.poll() is None:
        server.terminate()
        try:
            server.wait(STOP_TIMEOUT_S)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            server.kill()
            server.wait()


if __name__ == "__main__":
    sys.exit(main())
