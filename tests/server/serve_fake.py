"""The real server in front of the engine whose model is a rule: `python serve_fake.py PORT [field=value …]`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

from powerband.engine.client.supervisor import EngineProcess
from powerband.errors import PowerbandError
from powerband.server.run import serve
from powerband.server.settings import ServerSettings
from powerband.spec.settings import EngineSettings

COMMAND = (sys.executable, str(Path(__file__).with_name("fake_engine.py")))

if __name__ == "__main__":
    engine: dict[str, Any] = {"model": "parrot"}
    server: dict[str, Any] = {"port": int(sys.argv[1])}
    for argument in sys.argv[2:]:
        name, _, value = argument.partition("=")
        target = engine if name in EngineSettings.__dataclass_fields__ else server
        target[name] = int(value) if value.isdigit() else value
    try:
        sys.exit(serve(EngineSettings(**engine), ServerSettings(**server), partial(EngineProcess, command=COMMAND)))
    except PowerbandError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)
