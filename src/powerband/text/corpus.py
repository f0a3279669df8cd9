"""Text that every Python installation carries: the documentation inside its standard library.

The demo model is trained on one part of it and `powerband eval` measures perplexity on the other. Sources are
parsed, never imported. Another Python version carries slightly different text, so perplexity compares between
precisions and models on one machine, and only roughly between Python versions.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import inspect
import itertools
import math
import re
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

HELD_OUT_SHARE = 20  # one document in so many is kept for evaluation
_SKIPPED = re.compile(r"(^|/)(site-packages|dist-packages|tests?|idle_test|lib2to3|__pycache__)(/|$)")
_IN_C: tuple[ModuleType, ...] = (builtins, itertools, math, sys, time)  # documented, but without Python source
_MAX_ENTRY_CHARS = 4000  # characters of one docstring


@dataclass(frozen=True, slots=True)
class ApiEntry:
    """One documented thing: `json.dumps`, its signature (empty for a module) and its docstring."""

    name: str
    signature: str
    text: str

    @property
    def summary(self) -> str:
        """The first sentence of the docstring on one line, or nothing when none reads as one."""
        for paragraph in self.text.split("\n\n"):
            line = " ".join(paragraph.split())
            if "->" not in line:  # a signature, not a sentence
                sentence = re.split(r"(?<=[a-z)'\"`\]])\.\s", line + " ")[0].rstrip(". ")
                is_prose = 15 <= len(sentence) <= 160 and sentence[0].isupper() and "***" not in sentence
                return sentence + "." if is_prose and sentence.count("(") == sentence.count(")") else ""
        return ""


@dataclass(frozen=True, slots=True)
class Document:
    """The documentation of one module, or one topic of Python's own help (then with a single entry)."""

    name: str
    entries: tuple[ApiEntry, ...]

    @property
    def text(self) -> str:
        """The document as a reader sees it: heading, then each entry with its text indented."""
        return "\n\n".join(
            f"{entry.name}{entry.signature}\n{_indent(entry.text)}"
            if entry.signature
            else f"# {entry.name}\n\n{entry.text}"
            for entry in self.entries
        )


def documents() -> list[Document]:
    """Everything, in a fixed order. Text that occurs twice is kept once, first in what is held out."""
    held_out = held_out_documents()
    seen = {entry.text for document in held_out for entry in document.entries}
    return held_out + _without_repeats(_found(held_out=False), seen)


def held_out_documents() -> list[Document]:
    """The documents that the demo model never saw."""
    return _without_repeats(_found(held_out=True), set())


def is_held_out(name: str) -> bool:
    """Whether the document of that name is kept for evaluation: a hash of the name decides."""
    return hashlib.sha256(name.encode()).digest()[0] % HELD_OUT_SHARE == 0


def _without_repeats(found: list[Document], seen: set[str]) -> list[Document]:
    kept = []
    for document in found:
        entries = tuple(entry for entry in document.entries if entry.text not in seen)
        seen.update(entry.text for entry in entries)
        if entries:
            kept.append(Document(document.name, entries))
    return kept


def _found(held_out: bool) -> list[Document]:
    def wanted(name: str) -> bool:
        return is_held_out(name) == held_out

    return sorted(itertools.chain(_modules(wanted), _c_modules(wanted), _topics(wanted)), key=lambda d: d.name)


def _modules(wanted: Callable[[str], bool]) -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root).with_suffix("").as_posix()
        name = relative.removesuffix("/__init__").replace("/", ".")
        if _SKIPPED.search(relative) or relative.startswith("pydoc_data") or not wanted(name):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError, OSError):
            continue  # a few files are unreadable on purpose: they test Python's parser
        entries = tuple(_entries(tree, name))
        if entries:
            yield Document(name, entries)


def _entries(node: ast.AST, name: str) -> Iterator[ApiEntry]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text and len(text) > 10:
            yield ApiEntry(name, _signature(node), text[:_MAX_ENTRY_CHARS])
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _entries(child, f"{name}.{child.name}")
        elif isinstance(child, ast.If | ast.Try | ast.With):
            yield from _entries(child, name)


def _signature(node: ast.AST) -> str:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"({ast.unparse(node.args)})"
    if isinstance(node, ast.ClassDef):
        return f"({', '.join(map(ast.unparse, node.bases))})"
    return ""


def _c_modules(wanted: Callable[[str], bool]) -> Iterator[Document]:
    for module in filter(lambda module: wanted(module.__name__), _IN_C):
        entries = [ApiEntry(module.__name__, "", inspect.getdoc(module) or "")]
        for name, value in sorted(vars(module).items()):
            text = inspect.getdoc(value) if callable(value) and not name.startswith("_") else None
            if text:
                full_name = name if module is builtins else f"{module.__name__}.{name}"
                entries.append(ApiEntry(full_name, "(...)", text[:_MAX_ENTRY_CHARS]))
        yield Document(module.__name__, tuple(entry for entry in entries if entry.text))


def _topics(wanted: Callable[[str], bool]) -> Iterator[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return
    for name, text in sorted(topics.items()):
        if wanted(f"topic {name}"):
            yield Document(f"topic {name}", (ApiEntry(name, "", text.strip()),))


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" if line else "" for line in text.split("\n"))
