"""Tokens that stand beside tokenizer.json: in tokenizer_config.json, special_tokens_map.json and added_tokens.json.

Which file counts, and in which order tokens are added, is as in transformers 5 (`from_pretrained` of
tokenization_utils_base.py, `__init__` of tokenization_utils_tokenizers.py), so that ids and special tokens
are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as RustTokenizer

from powerband.documents import parse_json, read_bytes
from powerband.errors import EnvironmentFault, UsageError

CONFIG = "tokenizer_config.json"
_MAP = "special_tokens_map.json"
_ADDED = "added_tokens.json"
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXTRA, _EXTRA_BEFORE_5 = "extra_special_tokens", "additional_special_tokens"
_OWN = "model_specific_special_tokens"
_MAX_BYTES = 64 << 20
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True, slots=True)
class TokenFiles:
    """The tokens in the files beside tokenizer.json.

    `named` maps bos_token, eos_token, … and names of the model's own (image_token)
    to their text; `added` are tokens to add to those of tokenizer.json, in this order; `given_ids` are the ids that
    the files give to some of them.
    """

    named: dict[str, str]
    added: list[AddedToken]
    given_ids: dict[str, int]


@dataclass(frozen=True, slots=True)
class ClassTokens:
    """Special tokens of a class that builds its tokenizer itself.

    `named` are those that it has where the files name none. `added_again`: all of them lose the flags that the files
    give them (lstrip, single_word, …).
    """

    named: Mapping[str, str]
    added_again: bool = False


def read_token_files(
    config: dict[str, Any], folder: Path, rust: RustTokenizer, built_by: ClassTokens | None = None
) -> TokenFiles:
    """The tokens of a checkpoint, of which `config` is tokenizer_config.json and `rust` tokenizer.json.

    `built_by`: they are added to a tokenizer of that class, which has none of tokenizer.json's yet.
    Raises EnvironmentFault naming the file.
    """
    known = rust.get_added_tokens_decoder()
    given: dict[int, AddedToken] = {}
    merged = _with_names_of_5(config)
    if "added_tokens_decoder" in config:
        given = _checked(folder / CONFIG, lambda: _decoder(config["added_tokens_decoder"]))
        by_text = {token.content: token for token in given.values()}
    else:
        merged = _checked(folder / _MAP, lambda: _with_map(merged, read_table(folder / _MAP)))
        given = _checked(folder / _ADDED, lambda: _legacy(read_table(folder / _ADDED), merged))
        by_text = {token.content: token for token in (*given.values(), *known.values())}
        given = {**given, **known}  # of two tokens with one id, the one of tokenizer.json
    named = {name: by_text.get(token.content, token) for name, token in _named(merged).items()}
    extra = _checked(folder / CONFIG, lambda: _extra(merged))
    if built_by is not None:
        known = {}
        own = {name: AddedToken(text, special=True) for name, text in built_by.named.items() if name not in merged}
        names = dict.fromkeys((*_NAMES, *named, *own))
        named = {name: (named | own)[name] for name in names if name in named or name in own}
    added = _to_add(known, given, named, extra)
    if built_by is not None and built_by.added_again:
        added += [AddedToken(token.content, special=True) for token in (*named.values(), *extra)]
    return TokenFiles(
        named={name: token.content for name, token in named.items()},
        added=added,
        given_ids={token.content: id for id, token in given.items()},
    )


def _to_add(
    known: dict[int, AddedToken], given: dict[int, AddedToken], named: dict[str, AddedToken], extra: list[AddedToken]
) -> list[AddedToken]:
    """Given tokens in the order of their ids, then named and extra special tokens; of one text the last counts."""
    added = [token for _, token in sorted(given.items())]
    texts = {token.content for token in (*known.values(), *added)}
    added += {repr(token): token for token in (*named.values(), *extra) if token.content not in texts}.values()
    special = {token.content for token in named.values()}
    for token in added:
        token.special = token.special or token.content in special
    return added


def _decoder(table: Any) -> dict[int, AddedToken]:
    """added_tokens_decoder: id → token with its flags."""
    return {int(id): _token(value) for id, value in table.items()}


def _with_names_of_5(config: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json with extra special tokens under the name of transformers 5, and named ones in a table."""
    renamed = dict(config)
    if _EXTRA_BEFORE_5 in renamed and not renamed.get(_EXTRA):
        renamed[_EXTRA] = renamed.pop(_EXTRA_BEFORE_5)
    if isinstance(renamed.get(_EXTRA), dict):
        own = renamed.get(_OWN)
        renamed[_OWN] = (own if isinstance(own, dict) else {}) | renamed.pop(_EXTRA)
    return renamed


def _with_map(config: dict[str, Any], table: dict[str, Any]) -> dict[str, Any]:
    """special_tokens_map.json, all of whose tokens are special, over tokenizer_config.json. Lists of extra ones are
    joined; where both name them under different names, tokenizer_config.json counts (see `_extra`).
    """
    special = {name: {**value, "special": True} if isinstance(value, dict) else value for name, value in table.items()}
    if isinstance(table.get(_EXTRA), list):
        known = config.get(_EXTRA) or []
        special[_EXTRA] = [*known, *(one for one in table[_EXTRA] if one not in known)]
    elif isinstance(table.get(_EXTRA), dict):
        special[_EXTRA] = table[_EXTRA]
    merged = config | special
    if isinstance(merged.get(_EXTRA), dict):
        merged[_OWN] = (merged.get(_OWN) or {}) | merged.pop(_EXTRA)
    return merged


def _legacy(table: dict[str, Any], config: dict[str, Any]) -> dict[int, AddedToken]:
    """added_tokens.json: text → id. A token is special where the other files name it as one."""
    words = {name: value for name, value in config.items() if isinstance(value, str)}
    special = {token.content for token in (*_named(words).values(), *_extra(config))}
    return {
        int(id): AddedToken(text, normalized=text not in special, special=text in special) for text, id in table.items()
    }


def _named(config: dict[str, Any]) -> dict[str, AddedToken]:
    """Standard names first, then those of the model's own: keys in _token, and the table of them."""
    own = [name for name in config if name.endswith("_token") and name not in _NAMES]
    found = {name: config[name] for name in (*_NAMES, *own) if _is_token(config.get(name))}
    if isinstance(table := config.get(_OWN), dict):
        found |= {name: value for name, value in table.items() if _is_token(value)}
    return {name: _token(value, special=True) for name, value in found.items()}


def _extra(config: dict[str, Any]) -> list[AddedToken]:
    """extra_special_tokens, even if they are empty; without that name those of special_tokens_map.json's old one."""
    values = config[_EXTRA] if _EXTRA in config else config.get(_EXTRA_BEFORE_5)
    return [_token(value, special=True) for value in values or []]


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))


def _token(value: Any, special: bool = False) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, special=special)
    flags = {name: value[name] for name in _FLAGS if isinstance(value.get(name), bool)}
    return AddedToken(value["content"], **({"special": special} | flags))


def _checked(file: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        raise EnvironmentFault(
            f"{file} has tokens in a form that cannot be read: {error!r}.",
            hint="Each is a string, or an object with 'content'; ids are whole numbers. Fetch the file again.",
            code="tokenizer_format",
        ) from error


def read_table(file: Path) -> dict[str, Any]:
    """The table in a file; empty when there is none."""
    if not file.exists():
        return {}
    try:
        content = parse_json(read_bytes(file, "table of tokens", max_bytes=_MAX_BYTES))
    except (EnvironmentFault, UsageError) as error:
        raise EnvironmentFault(error.message, hint=error.hint, code="tokenizer_format") from error
    except ValueError as error:
        raise EnvironmentFault(
            f"{file} cannot be read: {error}.", hint="Fetch the file again.", code="tokenizer_format"
        ) from error
    return content if isinstance(content, dict) else {}
