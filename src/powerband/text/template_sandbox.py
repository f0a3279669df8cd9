"""The environment that chat templates run in: transformers' names and filters, in Jinja's sandbox.

Nothing that a template can reach shows where it lies in memory: functions, methods and iterators are wrapped, so that
a text is the same in every process and reveals nothing of this one.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Joiner, Namespace


class _Generation(Extension):
    """`{% generation %}` marks an assistant's tokens for training; rendering takes only what is inside."""

    tags = {"generation"}  # noqa: RUF012 (declared so by the base class)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    """A namespace that refuses names with underscores, which could reach Python's own."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        names = dict(*rest, **kwargs)
        for name in names:
            _refuse_underscore(name)
        Namespace.__init__(self, names)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


class _Cycler(Cycler):
    def __repr__(self) -> str:
        return "<cycler>"


class _Joiner(Joiner):
    def __repr__(self) -> str:
        return "<joiner>"


class _Function:
    """A function, method or class as templates see it: it can be called, and its text has no address."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __repr__(self) -> str:
        return "<callable>"


class _Iterator:
    """What a filter yields one by one; its text has no address."""

    __slots__ = ("_wrapped",)

    def __init__(self, wrapped: Iterator[Any]) -> None:
        self._wrapped = wrapped

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._wrapped)

    def __repr__(self) -> str:
        return "<iterator>"


class _Environment(ImmutableSandboxedEnvironment):
    """Hands out functions and iterators only wrapped."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        return _wrapped(super().getattr(obj, attribute))

    def getitem(self, obj: Any, argument: Any) -> Any:
        return _wrapped(super().getitem(obj, argument))

    def call(*args: Any, **kwargs: Any) -> Any:
        self, context, function, *rest = args
        function = function._function if isinstance(function, _Function) else function
        return ImmutableSandboxedEnvironment.call(self, context, function, *rest, **kwargs)


def make_environment() -> ImmutableSandboxedEnvironment:
    """The environment that authors of chat templates expect: transformers' globals, filters and trimming."""
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.filters.update({name: _wrapping(function) for name, function in environment.filters.items()})
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "namespace": _Namespace,
        "cycler": _Cycler,
        "joiner": _Joiner,
    }
    environment.globals.update({name: _wrapped(function) for name, function in environment.globals.items()})
    return environment


_PLAIN = frozenset((str, int, float, bool, type(None), list, dict, tuple))  # nearly all that is asked for


def _wrapped(value: Any) -> Any:
    if type(value) in _PLAIN or isinstance(value, Undefined | _Function):
        return value
    if callable(value):
        return _Function(value)
    return _Iterator(value) if isinstance(value, Iterator) and not isinstance(value, _Iterator) else value


def _wrapping(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same filter; `wraps` keeps the marks by which Jinja knows what to hand it."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return _wrapped(function(*args, **kwargs))

    return run


def _refuse_underscore(name: str) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}: it begins with an underscore")


def _raise_exception(message: str) -> None:
    raise TemplateError(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Plain JSON: Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
