"""Every command of README.md and docs/ can be typed as it stands there: the program knows it and all its options."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from cyclopts import CycloptsError
from markdown_commands import PAGES, RUN, Block, blocks, commands, powerband_lines, program

from powerband.cli.main import build_app

BLOCKS = [block for page in PAGES for block in blocks(page)]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.page.name}:{block.line}")
def test_commands_and_all_their_options_are_known(block: Block) -> None:
    for command in block.commands:
        for line in powerband_lines(command):
            try:
                build_app(line[0]).parse_args(line, exit_on_error=False, print_error=False)
            except CycloptsError as problem:
                pytest.fail(f"powerband {' '.join(line)}\n{problem}")


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.page.name}:{block.line}")
def test_what_the_tests_do_not_run_says_why(block: Block) -> None:
    unknown = [command for command in block.commands if program(command) not in RUN]
    assert not unknown or block.left_out, "put above the block: <!-- tests leave out: the reason -->"


def test_blocks_are_found_with_their_comments(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        inspect.cleandoc("""
        Text.

        ```
        KEY=$(powerband keys create app)   # a key
        curl http://127.0.0.1:8000 -d '{
          "model": "demo"
        }'
        ```

        <!-- tests leave out: needs a GPU -->
        ```sh
        powerband serve MODEL \\
            --device cuda
        ```

        ```python
        powerband = 1
        ```

        <!-- tests first run: powerband serve demo -->

        ```
        powerband bench
        ```
        """)
    )
    first, second, third = blocks(page)
    assert first.commands == (
        "KEY=$(powerband keys create app)   # a key",
        'curl http://127.0.0.1:8000 -d \'{\n  "model": "demo"\n}\'',
    )
    assert second.left_out == "needs a GPU"
    assert powerband_lines(second.commands[0]) == [["serve", "MODEL", "--device", "cuda"]]
    assert third.first == "powerband serve demo"
    assert program(first.commands[0]) == "powerband"
    assert commands("echo a | powerband generate demo --prompt -\n") == ["echo a | powerband generate demo --prompt -"]
