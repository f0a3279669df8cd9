"""Errors about a request that was translated to a chat, in the names of the API in which it was written."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence

from powerband.errors import PowerbandError
from powerband.openai.tools import FunctionDefinition, Tool

_PATH = re.compile(r"'([a-z_]+\.[^'\s]+)'")  # as errors quote it


class FieldPlaces:
    """Where the fields of a chat request came from: 'messages.3' → 'input.5', 'max_tokens' → 'max_output_tokens'."""

    def __init__(self, names: Mapping[str, str], inner: Mapping[str, str], phrases: Mapping[str, str]) -> None:
        """names: of the request's own fields, also where a text mentions them. inner: of fields of objects in it.
        phrases: of messages and hints.
        """
        self._inner = dict(inner)
        # A name that is also a word is one only in quotes.
        plain = {name: own for name, own in names.items() if "_" in name and "." not in name}
        quoted = {f"'{name}'": f"'{own}'" for name, own in names.items() if "_" not in name}
        self._words = {**plain, **quoted, **phrases}
        words = "|".join(rf"(?<![\w.]){re.escape(name)}(?!\w)" for name in plain)
        self._mentions = re.compile("|".join((words, *map(re.escape, (*quoted, *phrases)))))
        self._places = dict(names)

    def add(self, chat: str, own: str) -> None:
        """chat: the path of a field in the chat request, such as 'messages.3.content'."""
        self._places[chat] = own

    def of(self, param: str) -> str:
        """The place of a field, by the longest known beginning of its path."""
        parts = param.split(".")
        for count in range(len(parts), 0, -1):
            own = self._places.get(".".join(parts[:count]))
            if own is not None:
                if count == len(parts):
                    return own
                return ".".join((own, self._inner.get(parts[count], parts[count]), *parts[count + 1 :]))
        return param

    def tools(self, functions: Sequence[FunctionDefinition] | None) -> list[Tool] | None:
        """The tools of an API that writes a function's fields into the tool itself."""
        if functions is None:
            return None
        for index in range(len(functions)):
            self.add(f"tools.{index}.function", f"tools.{index}")
        return [Tool(function=function) for function in functions]

    @contextlib.contextmanager
    def translating(self) -> Iterator[None]:
        """Errors in this block name the fields as they were written."""
        try:
            yield
        except PowerbandError as error:
            if error.param is not None:
                error.param = self.of(error.param)
            error.message = _PATH.sub(lambda match: f"'{self.of(match[1])}'", error.message)
            error.message, error.hint = self._renamed(error.message), self._renamed(error.hint)
            raise

    def _renamed(self, text: str) -> str:
        return self._mentions.sub(lambda match: self._words[match[0]], text)
