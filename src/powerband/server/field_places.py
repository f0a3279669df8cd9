"""Errors about a request that was translated to a chat, in the names of the API in which it was written."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping

from powerband.errors import PowerbandError

_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class FieldPlaces:
    """Where the fields of a chat request came from: 'messages.3' → 'input.5', 'max_tokens' → 'max_output_tokens'."""

    def __init__(self, names: Mapping[str, str]) -> None:
        """names: of single fields."""
        self._names = dict(names)
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
                return ".".join((own, *(self._names.get(part, part) for part in parts[count:])))
        return param

    @contextlib.contextmanager
    def translating(self) -> Iterator[None]:
        """Errors in this block name the fields as they were written."""
        try:
            yield
        except PowerbandError as error:
            if error.param is not None:
                own = self.of(error.param)
                error.message = error.message.replace(f"'{error.param}'", f"'{own}'")
                error.param = own
            error.message, error.hint = self._renamed(error.message), self._renamed(error.hint)
            raise

    def _renamed(self, text: str) -> str:
        return _WORD.sub(lambda match: self._names.get(match[0], match[0]), text)
