"""Text to token ids and back, by the checkpoint's own files and with the same result as in transformers."""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Encoding
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from powerband.documents import LFS_HINT, is_lfs_pointer
from powerband.errors import EnvironmentFault, InvalidRequest
from powerband.files import open_regular
from powerband.text.added_tokens import CONFIG, TokenFiles, read_table, read_token_files
from powerband.text.pieces import PieceRules, clean_up_spaces, piece_rules
from powerband.text.tokenizer_class import tokenizer_class
from powerband.text.tokenizer_growth import check_growth

logger = logging.getLogger(__name__)

_FILES = [
    *("tokenizer.json", CONFIG, "special_tokens_map.json", "added_tokens.json"),
    *("config.json", "*.jinja", "tokenizer.model"),
]
_LEGACY_FILES = ("tokenizer.model", "tekken.json", "vocab.json", "spiece.model")
_CLEANS_UP_BPE = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"  # transformers' name
_HUGE_TEXT_CHARS = 1 << 20  # the library takes up to 300 bytes for each
_MAX_FILE_BYTES = 256 << 20  # the largest published ones have 40 MB
# What a tokenizer must be able to encode and decode before it is used: each shape of text that a step may fail on.
_SAMPLES = ("", " ", "a", "Hello, world!", "\n\t  x", "Würde 東京 🙂", "0123456789 " * 20)


class Tokenizer:
    """A checkpoint's tokenizer. Nothing changes after loading, so threads may share it.

    `special_tokens` maps bos_token, eos_token, … to their text, as chat templates expect them; `config` is
    tokenizer_config.json. `cleans_up_spaces`: decoded text goes through `clean_up_spaces`.
    """

    def __init__(self, rust: RustTokenizer, config: dict[str, Any], folder: Path) -> None:
        built_by = tokenizer_class(rust, config, read_table(folder / "config.json"))
        files = read_token_files(config, folder, rust, built_by.tokens if built_by else None)
        if built_by is None:
            rust.add_tokens(files.added)
        else:
            rust = built_by.build(rust, config, files)
        if rust.post_processor is None:  # as in transformers, so that the second of two texts has a type of its own
            rust.post_processor = TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
        rust.no_truncation()
        rust.no_padding()
        rust.encode_special_tokens = config.get("split_special_tokens") is True
        _warn_of_other_ids(rust, files, folder)
        self.folder = folder
        self.config = config
        self.vocab_size: int = rust.get_vocab_size(with_added_tokens=True)
        self.special_tokens = files.named
        self.bos_token_id = self._id_of(rust, "bos_token")
        self.eos_token_id = self._id_of(rust, "eos_token")
        self.special_ids = frozenset(id for id in rust.get_added_tokens_decoder() if _is_skipped(rust, id))
        self.rules: PieceRules | None = piece_rules(json.loads(rust.to_str()).get("decoder"))
        self.cleans_up_spaces = bool(config.get("clean_up_tokenization_spaces")) and (
            not isinstance(rust.model, BPE) or bool(config.get(_CLEANS_UP_BPE))
        )
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
        if not file.exists():
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
            with open_regular(file) as opened:
                content = opened.read(200)
        except OSError as error:
            raise EnvironmentFault(
                f"{file} cannot be read: {error.strerror}.", hint="Fetch the file again.", code="tokenizer_format"
            ) from error
        if is_lfs_pointer(content):
            raise EnvironmentFault(
                f"{file} is a Git LFS pointer, not the file.", hint=LFS_HINT, code="tokenizer_format"
            )
        if (num_bytes := file.stat().st_size) > _MAX_FILE_BYTES:
            raise EnvironmentFault(
                f"{file} has {num_bytes:,} bytes; the limit is {_MAX_FILE_BYTES:,}.", code="tokenizer_format"
            )
        try:
            rust = RustTokenizer.from_file(str(file))
            check_growth(rust)
            tokenizer = cls(rust, read_table(path / CONFIG), path)
            tokenizer._check()
        except BaseException as error:
            if isinstance(error, EnvironmentFault) or not (isinstance(error, Exception) or _is_panic(error)):
                raise
            raise EnvironmentFault(
                f"{file} is not a tokenizer that can be used: {_reason(error)}.",
                hint="Fetch the file again, or upgrade the tokenizers package.",
                code="tokenizer_format",
            ) from error
        return tokenizer

    def encode(self, text: str, add_special_tokens: bool = True, *, max_tokens: int | None = None) -> list[int]:
        """Token ids of `text`; with special tokens (usually BOS) as the post-processor of
        tokenizer.json adds them; as in transformers, "add_bos_token" changes nothing beside that. max_tokens: keep only
        the first of the text's own, so that there are no more with the special ones.

        Takes up to 1 s per million characters, during which other threads run: bound the length before.
        Raises InvalidRequest.
        """
        encoding = self._encoding(text, add_special_tokens)
        if max_tokens is not None and len(encoding) > max_tokens:
            encoding = self._cut(text, add_special_tokens, max_tokens)
        ids: list[int] = encoding.ids
        if len(text) >= _HUGE_TEXT_CHARS:
            del encoding
            _return_freed_memory()
        return ids

    def _encoding(self, text: str, add_special_tokens: bool = False) -> Encoding:
        """Raises InvalidRequest."""
        try:
            # Unlike `encode`, it lets go of the interpreter's lock, and it does not note where tokens begin and end.
            [encoding] = self._rust.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except (UnicodeEncodeError, TypeError) as error:  # the library says "must be str"
            raise InvalidRequest(
                "The text has half of a surrogate pair, which is not a character.",
                hint="Send complete characters (in JSON, both \\u escapes of a pair).",
            ) from error
        except BaseException as error:
            if not (isinstance(error, Exception) or _is_panic(error)):
                raise
            raise InvalidRequest(
                f"The model's tokenizer cannot encode this text: {_reason(error)}.",
                hint="Send other text, or token ids.",
                code="tokenizer_failed",
            ) from error
        return encoding

    def encode_pair(self, first: str, second: str, *, max_tokens: int | None = None) -> tuple[list[int], int | None]:
        """Token ids of two texts as one, as the post-processor joins them, and where the second one's type begins.

        None: the tokenizer has no types. max_tokens: the longer text loses its last tokens until there are no more, as
        in transformers ("longest_first"). Otherwise as `encode`.
        """
        texts = [self._encoding(text) for text in (first, second)]
        if max_tokens is not None:
            room = max(max_tokens - self._rust.num_special_tokens_to_add(is_pair=True), 0)
            for encoding, length in zip(texts, _shared_room([len(text) for text in texts], room), strict=True):
                encoding.truncate(length)
        joined = self._rust.post_process(texts[0], texts[1], add_special_tokens=True)
        return joined.ids, joined.type_ids.index(1) if 1 in joined.type_ids else None

    def _cut(self, text: str, add_special_tokens: bool, max_tokens: int) -> Encoding:
        """As transformers truncates: the text's last tokens go, the special ones stay."""
        encoding = self._encoding(text)
        num_special = self._rust.num_special_tokens_to_add(is_pair=False) if add_special_tokens else 0
        encoding.truncate(max(max_tokens - num_special, 0))
        return self._rust.post_process(encoding, add_special_tokens=add_special_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Ids outside the vocabulary stand for nothing. Raises InvalidRequest."""
        text = self.decode_part(ids, skip_special_tokens)
        return clean_up_spaces(text) if self.cleans_up_spaces else text

    def decode_part(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """As `decode`, of ids amid others: with all spaces."""
        try:
            text: str = self._rust.decode(list(ids), skip_special_tokens=skip_special_tokens)
        except BaseException as error:
            if not (isinstance(error, Exception) or _is_panic(error)):
                raise
            raise InvalidRequest(
                f"The model's tokenizer cannot decode these tokens: {_reason(error)}.", code="tokenizer_failed"
            ) from error
        return text

    def token(self, id: int) -> str:
        """The piece as the vocabulary spells it ("Ġthe", "▁the"), "" for ids outside the vocabulary."""
        return self._rust.id_to_token(id) or ""

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token stands for; they need not be whole characters."""
        known = self._bytes.get(id)
        if known is None:
            piece = self.token(id)
            known = self.rules.to_bytes(piece) if self.rules else self.decode_part([id], False).encode()
            self._bytes[id] = known
        return known

    def token_id(self, piece: str) -> int | None:
        id: int | None = self._rust.token_to_id(piece)
        return id

    def to_json(self) -> str:
        """As a tokenizer.json, with everything that other files added."""
        text: str = self._rust.to_str()
        return text

    def _check(self) -> None:
        """Encode and decode samples and every token. Raises whatever the library panics with.

        Any Exception is accepted: a vocabulary of a few words cannot encode others, but still serves token ids.
        """
        for text in _SAMPLES:
            for add_special_tokens in (True, False):
                with contextlib.suppress(Exception):
                    self._rust.encode(text, add_special_tokens=add_special_tokens)
        with contextlib.suppress(Exception):
            self._rust.decode(list(range(self.vocab_size)), skip_special_tokens=False)

    def _id_of(self, rust: RustTokenizer, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else rust.token_to_id(text)


def _shared_room(lengths: list[int], room: int) -> list[int]:
    """How much is left of two texts that share `room`: the longer one is cut first, then both."""
    short, long = sorted(lengths)
    if short + long <= room:
        return lengths
    short = min(short, room // 2)
    long = room - short
    return [short, long] if lengths[0] <= lengths[1] else [long, short]


def _return_freed_memory() -> None:
    """To the operating system. glibc keeps it otherwise, in as many arenas as there are threads."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def _warn_of_other_ids(rust: RustTokenizer, files: TokenFiles, folder: Path) -> None:
    """Added tokens get the next free ids, whatever ids the files give; the same in transformers."""
    wrong = [(text, id, rust.token_to_id(text)) for text, id in files.given_ids.items() if rust.token_to_id(text) != id]
    if wrong:
        text, id, actual = wrong[0]
        logger.warning(
            "%s: the files give %r the id %d, but its place in the vocabulary is %s (%d such tokens)",
            *(folder, text, id, actual, len(wrong)),
        )


def _is_skipped(rust: RustTokenizer, id: int) -> bool:
    """Whether decoding leaves a token out as special: asked of the library, where once special is always special."""
    return not rust.decode([id], skip_special_tokens=True) and bool(rust.decode([id], skip_special_tokens=False))


def _is_panic(error: BaseException) -> bool:
    """Whether the Rust library panicked: its exception is not an Exception, and cannot be imported."""
    return type(error).__name__ == "PanicException"


def _reason(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200].rstrip(".")


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
