"""Planning, memory plans and the commands around them run where torch is not installed; the others name the extra."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from powerband.cli.main import main
from powerband.extras import MissingPackage, pip_command

# Each command with what it prints. They run in one process, in which torch and scipy cannot be imported.
WORK = {
    "devices": "H100",
    "devices L4": "bandwidth_bytes_per_s",
    "memory demo": "KV cache",
    "memory demo --kernels off": "KV cache",
    "config show demo": "max_num_seqs",
    "plan demo --devices L4 --rate 0.2 --prompt-tokens 32-128 --output-tokens 8-32 -o plan.yaml": "chosen",
    "simulate plan.yaml": "PASS",
    "keys create --help": "powerband keys create",
    "bench --help": "powerband bench",
    "gateway --help": "powerband gateway",
}
NEED_TORCH = ("serve demo", "generate demo --prompt hello", "eval demo", "calibrate", "doctor --compile")
Output = pytest.CaptureFixture[str]


def test_these_commands_work_without_torch(tmp_path: Path) -> None:
    code = "import sys; sys.modules['torch'] = sys.modules['scipy'] = None\n"
    code += "from powerband.cli.main import main\n"
    code += "".join(f"print({f'=== {command}'!r}); assert main({command.split()!r}) == 0\n" for command in WORK)
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    answers = dict(part.split("\n", 1) for part in shown.stdout.split("=== ")[1:])
    assert {command: text in answers[command] for command, text in WORK.items()} == dict.fromkeys(WORK, True)


@pytest.mark.parametrize("command", NEED_TORCH)
def test_these_need_torch_and_say_how_to_install_it(
    command: str, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(command.split()) == 3
    complaint = capsys.readouterr().err
    assert "needs torch, which is not installed." in complaint
    assert f"hint:  Run: {pip_command('torch')}" in complaint


def test_a_script_gets_an_import_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import powerband

    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"LLM needs torch, .* pip install 'powerband\[serve\]'") as failure:
        _ = powerband.LLM
    assert isinstance(failure.value, MissingPackage)
