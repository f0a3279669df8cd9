"""Files of a checkpoint that are no regular files, as a link or an archive may hold: refused at once, by name."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest

from powerband.engine.model_loader.generation_config import FILE as GENERATION_CONFIG
from powerband.errors import PowerbandError
from powerband.spec.checkpoint.files import weight_files
from powerband.spec.checkpoint.safetensors import read_header
from powerband.spec.model.reader import read_config
from powerband.text.chat_template import ChatTemplate
from powerband.text.tokenizer import Tokenizer

DEMO = Path(str(files("powerband") / "demo"))


def _socket(path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    folder = os.open(path.parent, os.O_RDONLY)  # names of sockets are short
    listener.bind(f"/proc/self/fd/{folder}/{path.name}")
    os.close(folder)
    listener.close()


SPECIAL: dict[str, Callable[[Path], None]] = {
    "FIFO": lambda path: os.mkfifo(path),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "socket": _socket,
    "folder": lambda path: path.mkdir(),
}


def _read(folder: Path, name: str) -> None:
    if name.endswith((".safetensors", ".safetensors.index.json")):
        for file in weight_files(folder):
            read_header(file)
    elif name in ("config.json", GENERATION_CONFIG):
        read_config(folder / name)
    else:
        tokenizer = Tokenizer.load(folder)
        assert tokenizer is not None
        template = ChatTemplate.load(tokenizer)
        if template is not None:
            template.close()


@pytest.mark.parametrize("make", SPECIAL.values(), ids=list(SPECIAL))
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        GENERATION_CONFIG,
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
    ],
)
def test_a_file_that_is_not_regular_is_refused(tmp_path: Path, name: str, make: Callable[[Path], None]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(DEMO, folder)
    file = folder / name
    file.unlink(missing_ok=True)
    make(file)
    with pytest.raises(PowerbandError) as caught:
        _read(folder, name)
    assert file.name in caught.value.message
