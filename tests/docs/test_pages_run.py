"""Every command of README.md and docs/ works as it stands there."""

from __future__ import annotations

from pathlib import Path

import pytest
from typed_pages import cases, type_page


@pytest.mark.parametrize(("page", "options"), cases())
def test_a_page_can_be_typed_from_its_first_command_to_its_last(
    page: Path, options: list[str], own_network: list[str], tmp_path: Path
) -> None:
    type_page(page, options, own_network, tmp_path)
