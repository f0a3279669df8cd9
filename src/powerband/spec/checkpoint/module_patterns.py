"""Names of modules as configurations list them: which modules a list names, in time linear in the module's name.

    self_attn, model.layers.0.mlp    whole parts of a name, wherever they stand in it
    model.layers.*.self_attn*        with * and ?: the name's beginning, up to the end of a part
    re:.*mlp.gate$                   a regular expression that begins where the name does (compressed-tensors)

A configuration comes from the network. Python's `re` can be made to run for years by a short pattern, so regular
expressions are run as automata (Thompson 1968), without backtracking. Known: literals, `.`, classes, groups, `|`, `*`,
`+`, `?`, `{m,n}`, `$` and a leading `^`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from powerband.errors import UsageError
from powerband.spec.config_reader import shown

_MAX_PATTERNS = 10_000
_MAX_EXPRESSIONS = 1000  # of them, with * or as regular expressions
_MAX_INSTRUCTIONS = 5000  # of one expression
_MAX_DEPTH = 20  # of groups in groups
_MAX_KNOWN = 10_000  # transitions of one expression that are kept

_Test = Callable[[str], bool]
_CLASSES: dict[str, _Test] = {
    "d": str.isdecimal,
    "w": lambda char: char.isalnum() or char == "_",
    "s": str.isspace,
    "D": lambda char: not char.isdecimal(),
    "W": lambda char: not (char.isalnum() or char == "_"),
    "S": lambda char: not char.isspace(),
}


class ModulePatterns:
    """A list of patterns. Raises UsageError for too many, and for an expression that is not understood."""

    def __init__(self, patterns: Iterable[str]) -> None:
        texts = tuple(patterns)
        expressions = [text for text in texts if text.startswith("re:") or "*" in text or "?" in text]
        if len(texts) > _MAX_PATTERNS or len(expressions) > _MAX_EXPRESSIONS:
            raise UsageError(
                f"A quantization names {len(texts)} modules, {len(expressions)} of them by expressions; at most "
                f"{_MAX_PATTERNS} and {_MAX_EXPRESSIONS}.",
                param="quantization_config",
            )
        self._names = frozenset(texts) - frozenset(expressions)
        self._expressions = [Expression(text) for text in dict.fromkeys(expressions)]

    def match(self, module: str) -> bool:
        """Whether one of them names the module, or a module that it is in."""
        parts = module.split(".")
        runs = (".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1))
        return any(run in self._names for run in runs) or any(one.match(module) for one in self._expressions)


class _Instruction(NamedTuple):
    """Of a program: go to other places (by how far they are), or on when a character passes the test, or at the end."""

    jumps: tuple[int, ...] = ()
    test: _Test | None = None
    is_end: bool = False


_Program = list[_Instruction]


class Expression:
    """A regular expression, as a program that is run on all its ways at once. Raises UsageError, as ModulePatterns."""

    def __init__(self, pattern: str) -> None:
        self._program = _Compiler(pattern).program
        self._known: dict[tuple[frozenset[int], str], frozenset[int]] = {}
        self._start = self._reached({0}, at_end=False)

    def match(self, text: str) -> bool:
        """Whether the beginning of `text` is matched, as by re.match."""
        places, end = self._start, len(self._program)
        for char in text:
            if end in places:
                return True
            if not places:
                return False
            places = self._after(places, char)
        return end in self._reached(places, at_end=True)

    def _after(self, places: frozenset[int], char: str) -> frozenset[int]:
        found = self._known.get((places, char))
        if found is None:
            tests = ((place, self._program[place].test) for place in places if place < len(self._program))
            found = self._reached({place + 1 for place, test in tests if test is not None and test(char)}, at_end=False)
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            self._known[places, char] = found
        return found

    def _reached(self, places: Iterable[int], *, at_end: bool) -> frozenset[int]:
        """These places, and those that are reached from them without a character."""
        found, pending = set(places), list(places)
        while pending:
            place = pending.pop()
            if place == len(self._program):
                continue
            one = self._program[place]
            new = {place + jump for jump in one.jumps} | ({place + 1} if one.is_end and at_end else set())
            pending += new - found
            found |= new
        return frozenset(found)


class _Compiler:
    """Raises UsageError for what it does not know. Programs may be moved: all jumps are relative."""

    def __init__(self, pattern: str) -> None:
        self._pattern, self._at, self._depth = pattern, 0, 0
        if pattern.startswith("re:"):
            self._text = pattern.removeprefix("re:").removeprefix("^")
            self.program = self._alternatives()
            if self._at < len(self._text):
                raise self._error()
        else:
            self._text = pattern
            self.program = self._wildcards()

    def _wildcards(self) -> _Program:
        """The whole pattern, and then the name's end or that of a part."""
        program: _Program = []
        for char in self._text:
            program += _star([_Instruction(test=_any)]) if char == "*" else [_Instruction(test=_literal(char))]
        end_of_part = [_Instruction(test=_literal("."))]
        return self._checked([*program, *_either([[_Instruction(is_end=True)], end_of_part])])

    def _alternatives(self) -> _Program:
        branches = [self._sequence()]
        while self._take("|"):
            branches.append(self._sequence())
        return self._checked(_either(branches))

    def _sequence(self) -> _Program:
        program: _Program = []
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            program = self._checked(program + self._repeated())
        return program

    def _repeated(self) -> _Program:
        program = self._atom()
        sign = self._take(*"*+?{")
        if sign is None:
            return program
        repeat = {"*": _star, "+": _plus, "?": _optional, "{": self._counted}[sign]
        program = self._checked(repeat(program))
        self._take("?")  # a lazy one matches the same names
        return program

    def _counted(self, program: _Program) -> _Program:
        inside, closed, _ = self._text[self._at :].partition("}")
        low, comma, high = inside.partition(",")
        numbers = [number for number in (low, high) if number]
        if not closed or not low or not all(number.isdecimal() and len(number) < 5 for number in numbers):
            raise self._error()
        self._at += len(inside) + 1
        low_count = int(low)
        high_count = int(high) if high else low_count
        if high_count < low_count or len(program) * high_count > _MAX_INSTRUCTIONS:
            raise self._error()
        rest = _star(program) if comma and not high else _optional(program) * (high_count - low_count)
        return program * low_count + rest

    def _atom(self) -> _Program:
        char = self._text[self._at]
        self._at += 1
        if char == "(":
            return self._group()
        if char == "[":
            return [_Instruction(test=self._class())]
        if char == "$":
            return [_Instruction(is_end=True)]
        if char in "*+?{^":
            raise self._error()
        return [_Instruction(test=_any if char == "." else self._escaped() if char == "\\" else _literal(char))]

    def _group(self) -> _Program:
        self._depth += 1
        is_plain = not self._text.startswith("?", self._at) or self._text.startswith("?:", self._at)
        if self._depth > _MAX_DEPTH or not is_plain:
            raise self._error()
        self._at += 2 * self._text.startswith("?:", self._at)
        program = self._alternatives()
        if not self._take(")"):
            raise self._error()
        self._depth -= 1
        return program

    def _class(self) -> _Test:
        is_negated = self._take("^") is not None
        tests: list[_Test] = []
        while not tests or self._text[self._at : self._at + 1] != "]":
            if self._at >= len(self._text):
                raise self._error()
            first = self._text[self._at]
            self._at += 1
            if first == "\\":
                tests.append(self._escaped())
            elif self._text[self._at : self._at + 1] == "-" and self._text[self._at + 1 : self._at + 2] not in (
                "",
                "]",
            ):
                tests.append(_between(first, self._text[self._at + 1]))
                self._at += 2
            else:
                tests.append(_literal(first))
        self._at += 1
        return lambda char: any(test(char) for test in tests) != is_negated

    def _escaped(self) -> _Test:
        char = self._text[self._at : self._at + 1]
        self._at += 1
        if not char or (char.isalnum() and char not in _CLASSES):
            raise self._error()
        return _CLASSES.get(char) or _literal(char)

    def _take(self, *chars: str) -> str | None:
        char = self._text[self._at : self._at + 1]
        if not char or char not in chars:
            return None
        self._at += 1
        return char

    def _checked(self, program: _Program) -> _Program:
        if len(program) > _MAX_INSTRUCTIONS:
            raise self._error()
        return program

    def _error(self) -> UsageError:
        return UsageError(
            f"A quantization names its modules by an expression that is not understood: {shown(self._pattern)}.",
            hint="Known: . [] () | * + ? {} $, without look-ahead and references.",
            code="unsupported_quantization",
            param="quantization_config",
        )


def _either(branches: list[_Program]) -> _Program:
    program = branches[-1]
    for branch in reversed(branches[:-1]):
        skip = _Instruction(jumps=(len(program) + 1,))
        program = [_Instruction(jumps=(1, len(branch) + 2)), *branch, skip, *program]
    return program


def _star(program: _Program) -> _Program:
    size = len(program)
    return [_Instruction(jumps=(1, size + 2)), *program, _Instruction(jumps=(-size - 1,))]


def _plus(program: _Program) -> _Program:
    return [*program, _Instruction(jumps=(-len(program), 1))]


def _optional(program: _Program) -> _Program:
    return [_Instruction(jumps=(1, len(program) + 1)), *program]


def _any(_char: str) -> bool:
    return True


def _literal(wanted: str) -> _Test:
    return lambda char: char == wanted


def _between(low: str, high: str) -> _Test:
    return lambda char: low <= char <= high
