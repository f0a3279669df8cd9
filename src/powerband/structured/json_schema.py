"""JSON Schemas of requests: checked, and rewritten into the part of JSON Schema that llguidance enforces exactly.

A keyword that would not be enforced is an error that names its place. Keywords of older drafts are rewritten into
those of 2020-12; what asks for nothing (`uniqueItems: false`) is left out; what describes is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from powerband.errors import InvalidRequest
from powerband.structured.exclusive import Alternatives
from powerband.structured.regex import portable
from powerband.structured.trial import check_repeats

MAX_DEPTH = 96  # of values in values; the library that compiles takes 128

_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")  # keywords whose value is a list of schemas
_MAPS = ("properties", "patternProperties", "$defs", "definitions")  # … an object of schemas
_SCHEMAS = ("items", "additionalProperties")  # … a schema
_PLAIN = (
    *("type", "const", "enum", "required", "$ref", "pattern", "format", "minimum", "maximum", "multipleOf"),
    *("exclusiveMinimum", "exclusiveMaximum", "minLength", "maxLength", "minItems", "maxItems"),
    *("minProperties", "maxProperties"),
)
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
# Keywords that say nothing about what is valid, and that the library must not see: it would take them for something.
_ANNOTATIONS = frozenset(
    (
        *("title", "description", "default", "example", "examples", "deprecated", "readOnly", "writeOnly", "$comment"),
        *("$schema", "$vocabulary", "contentEncoding", "contentMediaType", "contentSchema", "discriminator", "xml"),
        *("externalDocs", "nullable"),
    )
)
_ANY: tuple[Any, ...] = (True, {})
# Keywords that cannot be enforced, and their values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "uniqueItems": (False,),
    "not": (False,),
    "contains": (),
    "if": (),
    "propertyNames": _ANY,
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "dependencies": ({},),
    "unevaluatedItems": _ANY,
    "unevaluatedProperties": _ANY,
    "$dynamicRef": (),
    "$recursiveRef": (),
    "x-guidance": (),  # not JSON Schema's: it would switch off what is promised
    **dict.fromkeys(("extends", "disallow", "divisibleBy"), ()),  # of draft 3
}
# Keywords that mean something only beside another one.
_BESIDE = {"minContains": "contains", "maxContains": "contains", "then": "if", "else": "if", "additionalItems": "items"}
_APPLICATORS = ("anyOf", "oneOf", "allOf", "$ref", "patternProperties")
FORMATS = ("duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
# Dates that there are, from year 1 on, and times without leap seconds, which only some minutes have (RFC 3339).
_DATE = (
    r"(([0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])"
    r"|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))"
    r"|([0-9]{2}(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)-02-29)"
)
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_PATTERNS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}
# What pydantic writes for Decimal, and the same without what regular expressions here do not have.
_WITHOUT_LOOKAHEAD = {
    r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$": r"^[+-]?(\d+\.?\d*|\.\d+)$",
}
# Formats of JSON Schema that cannot be enforced. Others ("int32", "password") are not JSON Schema's, and describe.
_UNSUPPORTED_FORMATS = frozenset(
    (
        *("idn-email", "idn-hostname", "uri-reference", "iri", "iri-reference", "uri-template", "json-pointer"),
        *("relative-json-pointer", "regex"),
    )
)


class SchemaReader:
    """Reads one schema. `closed`: objects have no properties beside those that a schema names."""

    def __init__(self, place: str, *, closed: bool = False) -> None:
        """place: what errors call the schema itself."""
        self._place = place
        self._closed = closed
        self._alternatives = Alternatives(None)

    def read(self, schema: Any) -> Any:
        """The schema in the form that can be compiled. Raises InvalidRequest naming the place."""
        self._alternatives = Alternatives(schema)
        return self._read(schema, (), 0)

    def _read(self, schema: Any, path: tuple[str, ...], depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise self._error(path[:8], f"is nested more than {MAX_DEPTH} deep", "Use $defs and $ref for parts of it.")
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise self._error(path, f"is {_shown(schema)}; it must be a schema: an object, true or false")
        discriminator = schema.get("discriminator")
        schema = self._modern(schema)
        read: dict[str, Any] = {}
        for name, value in schema.items():
            here = (*path, name)
            if name in _LISTS:
                items = enumerate(self._typed(value, list, here, "a list of schemas"))
                parts = [self._read(item, (*here, str(index)), depth + 2) for index, item in items]
                read[name] = [*read.get(name, []), *parts]
            elif name in _MAPS:
                named = self._typed(value, dict, here, "an object of schemas").items()
                read[name] = {
                    self._name(name, key, here): self._read(part, (*here, key), depth + 2) for key, part in named
                }
            elif name in _SCHEMAS:
                read[name] = self._read(value, here, depth + 1)
            elif name in _UNSUPPORTED:
                self._check_unsupported(name, value, here)
            elif name in _PLAIN:
                self._put_plain(read, name, value, here, depth)
            elif name in ("$id", "id", "$anchor"):
                read[name] = value
        self._check_min_properties(read, path)
        if "oneOf" in read:
            self._read_one_of(read, discriminator)
        if self._closed and "additionalProperties" not in read and ("properties" in read or _is_object(read)):
            read["additionalProperties"] = False
        return read

    def _modern(self, schema: dict[str, Any]) -> dict[str, Any]:
        """The same with keywords of 2020-12 for those of older drafts, and without those that have no effect."""
        modern = {name: value for name, value in schema.items() if name not in _ANNOTATIONS}
        for name, other in _BESIDE.items():
            if other not in modern or (name == "additionalItems" and not isinstance(modern["items"], list)):
                modern.pop(name, None)
        if "then" not in modern and "else" not in modern:
            modern.pop("if", None)
        if isinstance(modern.get("items"), list):
            rest = modern.pop("additionalItems", None)
            modern = {("prefixItems" if name == "items" else name): value for name, value in modern.items()}
            if rest is not None:
                modern["items"] = rest
        for name, plain in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
            if isinstance(is_exclusive := modern.get(name), bool):
                del modern[name]
                if is_exclusive and plain in modern:
                    modern[name] = modern.pop(plain)
        if modern.get("unevaluatedProperties") is False and not any(name in modern for name in _APPLICATORS):
            modern["additionalProperties"] = modern.get("additionalProperties", modern.pop("unevaluatedProperties"))
            modern.pop("unevaluatedProperties", None)
        return modern

    def _read_one_of(self, read: dict[str, Any], discriminator: Any) -> None:
        exclusive = self._alternatives.exclusive(read["oneOf"], discriminator)
        if exclusive is not None:
            del read["oneOf"]
            if "anyOf" in read:
                read["allOf"] = [*read.get("allOf", []), {"anyOf": exclusive}]
            else:
                read["anyOf"] = exclusive

    def _check_unsupported(self, name: str, value: Any, path: tuple[str, ...]) -> None:
        if not any(value == neutral and type(value) is type(neutral) for neutral in _UNSUPPORTED[name]):
            raise self._error(path, "cannot be enforced", "Leave it out, and check the answer yourself.")

    def _put_plain(self, read: dict[str, Any], name: str, value: Any, path: tuple[str, ...], depth: int) -> None:
        if name in _COUNTS:
            if not isinstance(value, int | float) or isinstance(value, bool) or value < 0 or value != int(value):
                raise self._error(path, f"is {_shown(value)}; it must be a whole number that is not negative")
            value = int(value)
        elif name == "$ref" and not str(value).startswith("#"):
            raise self._error(
                path, f"is {_shown(value)}, in another document; nothing is fetched", "Put it into $defs."
            )
        elif name == "pattern":
            value = self._regex(self._typed(value, str, path, "a regular expression"), path)
        elif name == "format" and self._typed(value, str, path, "a string") not in FORMATS:
            if value in _PATTERNS:
                read.setdefault("allOf", []).append({"pattern": _PATTERNS[value]})
            elif value in _UNSUPPORTED_FORMATS:
                raise self._error(path, f"is {_shown(value)}, which cannot be enforced", "Leave it out.")
            return
        elif name in ("const", "enum"):
            self._check_value(value, path, depth)
        elif name == "required":
            names = self._typed(value, list, path, "a list of names")
            value = list(dict.fromkeys(self._name("properties", key, path) for key in names))
        read[name] = value

    def _check_value(self, value: Any, path: tuple[str, ...], depth: int) -> None:
        if depth > MAX_DEPTH:
            raise self._error(path[:8], f"is nested more than {MAX_DEPTH} deep")
        if isinstance(value, str):
            self._check_text(value, path)
        elif isinstance(value, list):
            for item in value:
                self._check_value(item, path, depth + 1)
        elif isinstance(value, dict):
            for key, item in value.items():
                self._check_text(key, path)
                self._check_value(item, path, depth + 1)

    def _name(self, keyword: str, name: Any, path: tuple[str, ...]) -> str:
        text: str = self._typed(name, str, path, "names")
        if keyword == "patternProperties":
            return self._regex(text, path)
        if keyword == "properties":
            self._check_text(text, path)
        return text

    def _regex(self, pattern: str, path: tuple[str, ...]) -> str:
        try:
            check_repeats(pattern)
        except InvalidRequest as error:
            raise self._error(path, f"cannot be used: {error.message}") from error
        return portable(_WITHOUT_LOOKAHEAD.get(pattern, pattern))

    def _check_text(self, text: str, path: tuple[str, ...]) -> None:
        """Strings are written without \\u escapes: with them, a property could be named twice."""
        if any(char < " " and char not in "\b\t\n\f\r" for char in text):
            raise self._error(path, f"has a control character in {_shown(text)}, which cannot be written")

    def _check_min_properties(self, schema: Mapping[str, Any], path: tuple[str, ...]) -> None:
        """The names of properties that are not listed may repeat, so that they count as one only."""
        count, required = schema.get("minProperties", 0), len(schema.get("required", ()))
        if count > required + 1:
            raise self._error(
                (*path, "minProperties"),
                f"is {count}, which cannot be enforced: it may be at most one more than the required properties",
                "Name the properties in 'required'.",
            )

    def _typed(self, value: Any, kind: type, path: tuple[str, ...], wanted: str) -> Any:
        if not isinstance(value, kind):
            raise self._error(path, f"is {_shown(value)}; it must be {wanted}")
        return value

    def _error(self, path: tuple[str, ...], what: str, hint: str = "") -> InvalidRequest:
        place = ".".join((self._place, *path))
        return InvalidRequest(f"'{place[:400]}' {what}.", hint=hint, param=place[:400], code="unsupported_schema")


def children(schema: Any) -> list[tuple[tuple[str, ...], Any]]:
    """The schemas directly inside one that was read, with their places."""
    if not isinstance(schema, dict):
        return []
    found: list[tuple[tuple[str, ...], Any]] = []
    for name, value in schema.items():
        if name in _LISTS:
            found += [((name, str(index)), item) for index, item in enumerate(value)]
        elif name in _MAPS:
            found += [((name, key), part) for key, part in value.items()]
        elif name in _SCHEMAS:
            found.append(((name,), value))
    return found


def with_parts(schema: Mapping[str, Any], make: Callable[[Any], Any]) -> dict[str, Any]:
    """A schema that was read, with what `make` gives for each schema directly in it."""
    made: dict[str, Any] = dict(schema)
    for name, value in schema.items():
        if name in _LISTS:
            made[name] = [make(item) for item in value]
        elif name in _MAPS:
            made[name] = {key: make(part) for key, part in value.items()}
        elif name in _SCHEMAS:
            made[name] = make(value)
    return made


def _is_object(schema: Mapping[str, Any]) -> bool:
    return schema.get("type") == "object" or (isinstance(schema.get("type"), list) and "object" in schema["type"])


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "…"
