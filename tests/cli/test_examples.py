"""Every command's --help ends with examples, and each of them is a command line that the command takes."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from powerband.cli.examples import EXAMPLES, help_examples
from powerband.cli.main import GROUPS, SECTIONS, build_app, main

COMMANDS = [name for commands in SECTIONS.values() for name in commands]
COMMANDS += [f"{group} {name}" for group, (_, _, inner) in GROUPS.items() for name in inner]
COMMANDS += ["--install-completion"]
LINES = [(command, line) for command, lines in EXAMPLES.items() for line, _ in lines]


def test_every_command_has_examples() -> None:
    assert sorted(EXAMPLES) == sorted(COMMANDS)


@pytest.mark.parametrize(("command", "line"), LINES, ids=[line for _, line in LINES])
def test_an_example_is_a_command_line_that_its_command_takes(command: str, line: str) -> None:
    words = shlex.split(line.partition(" < ")[0])
    if re.fullmatch(r"POWERBAND_[A-Z_]+=\S+", words[0]):
        words = words[1:]
    assert words[0] == "powerband"
    assert words[1 : 1 + len(command.split())] == command.split()
    build_app(words[1]).parse_args(words[1:], exit_on_error=False, print_error=False)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_the_examples_as_they_are_typed(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    shown = "\n".join(line.rstrip() for line in capsys.readouterr().out.rstrip().splitlines())
    assert shown.endswith(help_examples(command))


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("powerband pl", "plan"),
        ("powerband keys cr", "create"),
        ("powerband serve demo --max-model", "--max-model-len"),
        ("powerband plan demo --objective lat", "latency"),
    ],
)
def test_bash_completes_commands_options_and_choices(script: Path, words: str, completed: str) -> None:
    line = (
        f". {script}; COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _powerband; echo ${{COMPREPLY[@]}}"
    )
    shown = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == [completed]


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "powerband.bash"
    assert main(["--install-completion", "--shell", "bash", "--output", str(path)]) == 0
    return path
