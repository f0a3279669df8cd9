"""Text to token ids and back, by the checkpoint's own tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as RustTokenizer

from powerband.errors import EnvironmentFault, InvalidRequest
from powerband.text.pieces import PieceRules, piece_rules

_FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "*.jinja", "tokenizer.model"]
_LEGACY_FILES = ("tokenizer.model", "tekken.json", "vocab.json", "spiece.model")
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A checkpoint's tokenizer. Nothing changes after loading, so threads may share it.

    `special_tokens` maps bos_token, eos_token, … to their text, as chat templates expect them.
    """

    def __init__(self, rust: RustTokenizer, config: dict[str, Any], folder: Path) -> None:
        rust.no_truncation()
        rust.no_padding()
        self.folder = folder
        self.config = config
        self.vocab_size: int = rust.get_vocab_size(with_added_tokens=True)
        self.special_tokens = {name: text for name in _SPECIAL_NAMES if (text := _token_text(config.get(name)))}
        self.bos_token_id = self._id_of(rust, "bos_token")
        self.eos_token_id = self._id_of(rust, "eos_token")
        added = rust.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self.rules: PieceRules | None = piece_rules(json.loads(rust.to_str()).get("decoder"))
        self._rust = rust
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def load(cls, folder: str | Path, *, revision: str | None = None) -> Tokenizer | None:
        """Read a folder, or a Hugging Face id. None when there is no tokenizer at all.

        Raises EnvironmentFault when the files cannot be read, or hold a format that only other libraries read.
        """
        path = Path(folder)
        if not path.is_dir():
            path = _download(str(folder), revision)
        file = path / "tokenizer.json"
        if not file.is_file():
            legacy = next((name for name in _LEGACY_FILES if (path / name).is_file()), None)
            if legacy is None:
                return None
            raise EnvironmentFault(
                f"{path} has {legacy} but no tokenizer.json.",
                hint='Convert it once, with transformers: python -c "from transformers import AutoTokenizer as T; '
                f"T.from_pretrained('{path}').save_pretrained('{path}')\"",
                code="tokenizer_format",
            )
        try:
            rust = RustTokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise EnvironmentFault(
                f"{file} is not a tokenizer that can be read: {error}.",
                hint="Fetch the file again, or upgrade the tokenizers package.",
                code="tokenizer_format",
            ) from error
        return cls(rust, _read_config(path), path)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; with special tokens (usually BOS) as the post-processor of
        tokenizer.json adds them; as in transformers, "add_bos_token" changes nothing beside that.

        Takes up to 1 s per million characters, during which other threads run: bound the length before.
        Raises InvalidRequest.
        """
        try:
            # Unlike `encode`, it lets go of the interpreter's lock, and it does not note where tokens begin and end.
            [encoding] = self._rust.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            ids: list[int] = encoding.ids
        except (UnicodeEncodeError, TypeError) as error:  # the library says "must be str"
            raise InvalidRequest(
                "The text has half of a surrogate pair, which is not a character.",
                hint="Send complete characters (in JSON, both \\u escapes of a pair).",
            ) from error
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Ids outside the vocabulary stand for nothing."""
        text: str = self._rust.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token(self, id: int) -> str:
        """The piece as the vocabulary spells it ("Ġthe", "▁the"), "" for ids outside the vocabulary."""
        return self._rust.id_to_token(id) or ""

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token stands for; they need not be whole characters."""
        known = self._bytes.get(id)
        if known is None:
            piece = self.token(id)
            known = self.rules.to_bytes(piece) if self.rules else self.decode([id], skip_special_tokens=False).encode()
            self._bytes[id] = known
        return known

    def token_id(self, piece: str) -> int | None:
        id: int | None = self._rust.token_to_id(piece)
        return id

    def _id_of(self, rust: RustTokenizer, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else rust.token_to_id(text)


def _token_text(value: Any) -> str | None:
    """tokenizer_config.json gives a special token as a string or as an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _read_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, with special tokens that only special_tokens_map.json names."""
    merged: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = folder / name
        if not file.is_file():
            continue
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise EnvironmentFault(
                f"{file} cannot be read: {error}.", hint="Fetch the file again.", code="tokenizer_format"
            ) from error
        if isinstance(content, dict):
            merged.update(content)
    return merged


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and most models lie in a folder

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_FILES))
    except (OSError, ValueError) as error:
        raise EnvironmentFault(
            f"No folder '{name}', and no tokenizer of that name could be fetched from the Hugging Face hub: {error}.",
            hint="Check the name and the network, or set HF_TOKEN for a gated model.",
            code="tokenizer_not_found",
        ) from error
