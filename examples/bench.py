"""What `make bench` runs: serve the demo model, load it for two minutes, and say where the report is.

Everything it does, a user can do by hand; it prints the commands. Standard library only.
"""

import argparse
import signal
import socket
import subprocess
import sys

REQUESTS = "--workload chat --prompt-tokens 32-256 --prefix-tokens 64 --output-tokens 16-96"
START = "120s"  # the first start compiles the kernels
LOAD = f"{REQUESTS} --rate 8 --slo ttft=200ms,tpot=20ms"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--duration", default="2m", help="of the load; default: 2m")
    parser.add_argument("--out", help="folder for the results; default: a new one in bench-runs/")
    arguments = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(130))  # so that the server is stopped then, too
    options = [
        *LOAD.split(),
        "--wait",
        START,
        "--duration",
        arguments.duration,
        *(["--out", arguments.out] if arguments.out else []),
    ]
    print(f"$ powerband serve demo --port {port} --log-level warning", flush=True)
    serve = [sys.executable, "-m", "powerband", "serve", "demo", "--port", str(port), "--log-level", "warning"]
    server = subprocess.Popen(serve, process_group=0)  # Ctrl-C is for this script, which then asks the server to end
    try:
        print(f"\n$ powerband bench {url} {' '.join(options)}", flush=True)
        return subprocess.run([sys.executable, "-m", "powerband", "bench", url, *options], check=False).returncode
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    sys.exit(main())
