"""Files in YAML or JSON that people write, or get from others: read within bounds, and with the same messages.

    read_table(path, "plan", param="plan") ──► dict, or UsageError: "plan.yaml is not valid YAML: line 3: …"

A file is judged before anything is built from it: its bytes, how deep it nests, how many values it has with every alias
written out, how long a value or a name is. What is within these bounds is small however it is read afterwards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from powerband.errors import EnvironmentFault, UsageError
from powerband.files import open_regular

if TYPE_CHECKING:
    from yaml.events import Event

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
LFS_HINT = "Run 'git lfs pull' in its folder."
MAX_BYTES = 1 << 20
MAX_DEPTH = 64
MAX_JSON_NODES = 2_000_000  # lists and objects of a JSON file; a safetensors header has three for each tensor
MAX_VALUES = 100_000  # names and values, each alias counting as all that it stands for
MAX_TEXT = 4096  # characters of one value
MAX_NAME = 200
MAX_DIGITS = 32
_INTEGER = re.compile(r"[-+]?(?:0[bx][0-9a-fA-F_]+|[0-9][0-9_:]*)")


def read_table(path: Path, what: str, *, max_bytes: int = MAX_BYTES, param: str | None = None) -> dict[Any, Any]:
    """The names and values of a YAML file (of which JSON is a part). what: such as 'plan'; param: of errors.

    Raises EnvironmentFault when it cannot be read, UsageError when it is something else.
    """
    content = read_bytes(path, what, max_bytes=max_bytes, param=param, allows_pipes=True)
    return parse_table(content, str(path), what, param=param)


def parse_table(content: bytes, name: str, what: str, *, param: str | None = None) -> dict[Any, Any]:
    """As `read_table`; name: of where it came from. An empty file is an empty table."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C where PyYAML was built with it
    try:
        text = content.decode("utf-8-sig")
        scan = _Scan()
        for event in yaml.parse(text, Loader=loader):
            scan.take(event)
        values = loader(text).get_single_data()
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as problem:
        raise UsageError(f"{name} is not valid YAML: {_one_line(problem)}.", param=param) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise _no_table(values, name, what, param)
    return values


def read_json_table(
    path: Path,
    what: str,
    *,
    max_bytes: int,
    param: str | None = None,
    code: str = "",
    missing_code: str = "",
    hint: str = "",
) -> dict[str, Any]:
    """The object in a JSON file, such as a model's configuration, whose values may be long. Raises as `read_table`.

    code: of what is wrong with it; missing_code, hint: when it cannot be read.
    """
    try:
        content = read_bytes(path, what, max_bytes=max_bytes, param=param)
    except EnvironmentFault as problem:
        raise EnvironmentFault(problem.message, hint=hint, code=missing_code, param=param) from None
    except UsageError as problem:
        raise UsageError(problem.message, hint=problem.hint, code=code, param=param) from None
    try:
        values = parse_json(content)
    except ValueError as problem:
        raise UsageError(f"{path} is not valid JSON: {_one_line(problem)}.", code=code, param=param) from None
    if not isinstance(values, dict):
        raise UsageError(_no_table(values, str(path), what, param).message, code=code, param=param)
    return values


def parse_json(content: bytes | str, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Any JSON within the bounds of depth and digits. Raises ValueError."""
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        if text.count("[") + text.count("{") > MAX_JSON_NODES:  # each takes 60 bytes, for two in the file
            raise _TooMuch(f"it has more than {MAX_JSON_NODES:,} lists and objects")
        values = json.loads(text, parse_int=_integer, object_pairs_hook=object_pairs_hook)
    except (RecursionError, UnicodeDecodeError) as problem:
        raise _TooMuch(_one_line(problem)) from None
    _check_depth(values)
    return values


def is_lfs_pointer(content: bytes) -> bool:
    """Whether it is what a clone without Git LFS has in the place of a large file."""
    return content.startswith(LFS_POINTER)


def read_bytes(path: Path, what: str, *, max_bytes: int, param: str | None = None, allows_pipes: bool = False) -> bytes:
    """The content of a file. allows_pipes: for files that a user names, such as `<(command)`; those of a checkpoint
    must be regular.

    Raises EnvironmentFault, and UsageError if it is larger.
    """
    try:
        with path.open("rb") if allows_pipes else open_regular(path) as file:
            content = file.read(max_bytes + 1)
    except OSError as problem:
        raise EnvironmentFault(f"Cannot read {path}: {problem.strerror or problem}.", param=param) from None
    except ValueError:  # a NUL in its name
        raise UsageError(f"{str(path)[:MAX_NAME]!r} is not a file name.", param=param) from None
    if is_lfs_pointer(content):
        raise UsageError(f"{path} is a Git LFS pointer, not the file.", hint=LFS_HINT, param=param)
    if len(content) > max_bytes:
        raise UsageError(f"{path} is not a valid {what}: it is larger than {_size(max_bytes)}.", param=param)
    return content


class _TooMuch(ValueError):
    pass


@dataclass(slots=True)
class _Level:
    """A list or table that is open. names: of a table so far; None: a list. values: in it, with all aliases."""

    anchor: str | None
    names: set[str] | None
    is_name: bool = False  # what comes next is one
    values: int = 1


@dataclass(slots=True)
class _Scan:
    """Follows a parser's events, which are flat however deep the file is, and raises for what is out of bounds."""

    levels: list[_Level] = field(default_factory=lambda: [_Level(None, None)])
    sizes: dict[str, int | None] = field(default_factory=dict)  # by anchor; None: still open

    def take(self, event: Event) -> None:
        import yaml.events as events

        line = event.start_mark.line + 1 if event.start_mark is not None else 0
        if isinstance(event, events.CollectionStartEvent):
            self._open(event.anchor, {} if isinstance(event, events.MappingStartEvent) else None, line)
        elif isinstance(event, events.CollectionEndEvent):
            closed = self.levels.pop()
            if closed.anchor is not None:
                self.sizes[closed.anchor] = closed.values
            self._add(closed.values, line)
        elif isinstance(event, events.AliasEvent):
            anchor = event.anchor or ""
            size = self.sizes.get(anchor, 1)  # an unknown one is the parser's to refuse
            if size is None:
                raise _TooMuch(f"line {line}: '*{anchor[:MAX_NAME]}' holds itself")
            self._add(size, line)
        elif isinstance(event, events.ScalarEvent):
            self._check_text(event.value, line, is_plain=event.implicit[0])
            if event.anchor is not None:
                self.sizes[event.anchor] = 1
            self._add(1, line)

    def _open(self, anchor: str | None, names: dict[str, None] | None, line: int) -> None:
        if len(self.levels) > MAX_DEPTH:
            raise _TooMuch(f"line {line}: it nests deeper than {MAX_DEPTH} levels")
        if anchor is not None:
            self.sizes[anchor] = None
        is_table = names is not None
        self.levels.append(_Level(anchor, set() if is_table else None, is_table))

    def _add(self, values: int, line: int) -> None:
        level = self.levels[-1]
        level.values += values
        if level.names is not None:
            level.is_name = not level.is_name
        if level.values > MAX_VALUES:
            raise _TooMuch(f"line {line}: it has more than {MAX_VALUES:,} values, with every alias written out")

    def _check_text(self, text: str, line: int, *, is_plain: bool) -> None:
        level = self.levels[-1]
        if level.names is not None and level.is_name:
            if len(text) > MAX_NAME:
                raise _TooMuch(f"line {line}: a name has {len(text):,} characters; the limit is {MAX_NAME}")
            if text in level.names:
                raise _TooMuch(f"line {line}: {text!r} occurs twice")
            if text != "<<":
                level.names.add(text)
        if len(text) > MAX_TEXT:
            raise _TooMuch(f"line {line}: a value has {len(text):,} characters; the limit is {MAX_TEXT:,}")
        if is_plain and len(text) > MAX_DIGITS and _INTEGER.fullmatch(text):
            raise _TooMuch(f"line {line}: a number has {len(text):,} digits; the limit is {MAX_DIGITS}")


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise _TooMuch(f"a number has {len(text):,} digits; the limit is {MAX_DIGITS}")
    return int(text)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [item for one in level if isinstance(one, dict | list) for item in _items(one)]
        if not level:
            return
    raise _TooMuch(f"it nests deeper than {MAX_DEPTH} levels")


def _items(value: dict[str, Any] | list[Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value


def _no_table(values: Any, name: str, what: str, param: str | None) -> UsageError:
    kind = {list: "a list", str: "a text", bool: "true or false"}.get(type(values), f"a {type(values).__name__}")
    hint = "Write one 'name: value' per line."
    return UsageError(f"{name} is not a valid {what}: it holds {kind}, not names and values.", hint=hint, param=param)


def _one_line(problem: Exception) -> str:
    """In one line: what a parser says may quote the file."""
    if isinstance(problem, UnicodeDecodeError):
        return f"byte {problem.start} is not valid UTF-8"
    if isinstance(problem, RecursionError):
        return f"it nests deeper than {MAX_DEPTH} levels"
    text = " ".join(str(problem).split())
    return (text if len(text) <= MAX_NAME else f"{text[:MAX_NAME]}…").rstrip(".")


def _size(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"
