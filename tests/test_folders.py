"""Where files are kept, also for a user whom the system does not know, as in a container on OpenShift."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from powerband.folders import cache_directory, expand_user, state_home

NAMELESS = 1_000_660_000
VARIABLES = ("HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME", "POWERBAND_CACHE", "POWERBAND_STATE")


def test_a_user_without_a_home_has_folders_at_the_root_as_containers_have(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: NAMELESS)
    assert cache_directory() == Path("/.cache/powerband")
    assert state_home() == Path("/.local/state/powerband")
    assert expand_user("~/model") == Path("~/model")
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_user("~/model") == Path("/home/me/model")


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("setpriv"), reason="only root may become somebody else")
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["status"], 3, "No service is deployed"),
        (["memory", "demo"], 0, "KV cache"),
        (["config", "show"], 0, "max_model_len"),
        (["memory", "~/nothing"], 3, "There is no folder '~/nothing'"),
        (["gateway", "--port", "0"], 3, "Set POWERBAND_STATE to a folder that this user can write."),
        (["plan", "demo", "--rate", "1"], 3, "has not been measured yet"),
    ],
)
def test_commands_of_a_nameless_user_show_no_traceback(arguments: list[str], code: int, words: str) -> None:
    # Root may read this environment's files; the capability to read lets the nameless user do so as well.
    become = ["setpriv", f"--reuid={NAMELESS}", "--regid=0", "--clear-groups"]
    become += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    done = subprocess.run(
        [*become, sys.executable, "-m", "powerband", *arguments],
        env={"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1"},
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    shown = done.stdout + done.stderr
    assert "Traceback" not in shown
    assert words in shown
    assert done.returncode == code
