"""What a request asks of the form of its answer. Names and meanings are vLLM's, so that scripts move over unchanged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from powerband.errors import InvalidRequest

MAX_SPECIFICATION_BYTES = 256 << 10  # of a schema, a regular expression, a grammar, or all choices together
MAX_CHOICES = 4096
KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """The form of an answer: exactly one of the first six. Raises InvalidRequest naming the field.

    Values are checked here as far as they can be without compiling; `structured.specification` does the rest.
    """

    json: dict[str, Any] | str | bool | None = None  # a JSON Schema, as a value or as JSON
    regex: str | None = None  # of the whole answer, in Python's syntax as far as Rust's regex crate has it
    choice: list[str] | None = None  # the answer is one of these
    grammar: str | None = None  # Lark's syntax as llguidance has it, or GBNF
    json_object: bool | None = None  # any JSON object
    structural_tag: dict[str, Any] | str | None = None  # free text, with tags whose content has a form
    disable_any_whitespace: bool = False  # JSON in one line, without spaces
    disable_additional_properties: bool = False  # objects have no properties beside those that a schema names
    whitespace_pattern: str | None = None  # a regular expression of what may stand between the parts of JSON
    disable_fallback: bool = False  # no effect: there is one backend

    def __post_init__(self) -> None:
        given = [name for name in KINDS if getattr(self, name) not in (None, False) or self._is_schema_false(name)]
        if len(given) != 1:
            asked = " and ".join(given) or "nothing"
            raise InvalidRequest(
                f"structured_outputs asks for {asked}; it takes exactly one of {', '.join(KINDS)}.",
                param="structured_outputs",
            )
        for name in ("regex", "grammar", "whitespace_pattern"):
            self._check_text(name)
        choices: Any = self.choice
        if choices is not None:
            if not isinstance(choices, list) or not choices or not all(isinstance(text, str) for text in choices):
                raise _wrong("choice", "a list of strings that is not empty")
            if len(choices) > MAX_CHOICES:
                raise InvalidRequest(
                    f"structured_outputs.choice has {len(choices)} entries; the limit is {MAX_CHOICES}.",
                    param="structured_outputs.choice",
                )
            if not all(choices):
                raise _wrong("choice", "a list of strings that are not empty")

    @property
    def kind(self) -> str:
        """Which of `KINDS` it is."""
        return next(name for name in KINDS if getattr(self, name) not in (None, False) or self._is_schema_false(name))

    def _is_schema_false(self, name: str) -> bool:
        return name == "json" and self.json is False

    def _check_text(self, name: str) -> None:
        value = getattr(self, name)
        if value is not None and (not isinstance(value, str) or not value):
            raise _wrong(name, "a string that is not empty")


def _wrong(name: str, wanted: str) -> InvalidRequest:
    return InvalidRequest(f"structured_outputs.{name} must be {wanted}.", param=f"structured_outputs.{name}")
