"""Small exercises with a right answer: what the demo model is trained on and what `powerband eval` asks.

Everything is a function of the seed. Exercises for training and for evaluation never overlap (a hash of the
question decides), except for products, whose table is too small to hold a part of it out.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import itemgetter

HELD_OUT_SHARE = 16  # one exercise in so many is kept for evaluation


@dataclass(frozen=True, slots=True)
class EvalTask:
    """One question and its only right answer.

    `question` is what a user asks in a chat, `prompt` the same as the start of a text to complete. `working` is what
    the demo model learns to write before the answer.
    """

    kind: str
    question: str
    prompt: str
    answer: str
    working: str = ""

    @property
    def reply(self) -> str:
        """The reply that the demo model learns in a chat."""
        return f"{self.working} {self.answer}".lstrip()

    @property
    def completion(self) -> str:
        """What the demo model learns to continue `prompt` with: the reply and a line end."""
        return ("" if self.prompt.endswith("\n") else " ") + self.reply + "\n"

    def is_right(self, reply: str) -> bool:
        """Whether `reply` is the answer: the line for copies, the value for JSON, else the last word or number."""
        if self.kind == "copy":
            return reply.strip() == self.answer
        if self.kind != "json":
            return re.findall(r"\w+", reply)[-1:] == [self.answer]
        try:
            return _pairs(reply) == _pairs(self.answer)
        except (ValueError, RecursionError):
            return False


def _pairs(text: str) -> object:
    """JSON with objects as sorted pairs: equal whatever the order of the fields, but not when one comes twice."""
    return json.loads(text, object_pairs_hook=lambda pairs: sorted(pairs, key=itemgetter(0)))


def eval_tasks(kind: str, seed: int, held_out: bool) -> Iterator[EvalTask]:
    """An endless stream of one kind of exercise; the same seed gives the same stream.

    Raises KeyError when `kind` is not one of KINDS.
    """
    make = _MAKERS[kind]
    rng = random.Random(f"{kind}/{seed}")  # noqa: S311 (exercises, not secrets)
    while True:
        exercise = make(rng)
        if kind == "multiply" or _is_held_out(exercise) == held_out:
            yield exercise


def _is_held_out(exercise: EvalTask) -> bool:
    return hashlib.sha256(exercise.prompt.encode()).digest()[0] % HELD_OUT_SHARE == 0


def _operand(rng: random.Random) -> int:
    digits = rng.choices((1, 2, 3), weights=(1, 3, 6))[0]
    return rng.randrange(10**digits)


def _sum_question(rng: random.Random, formula: str) -> str:
    return rng.choice((f"What is {formula}?", f"Calculate {formula}."))


def _add(rng: random.Random) -> EvalTask:
    a, b = _operand(rng), _operand(rng)
    return EvalTask("add", _sum_question(rng, f"{a} + {b}"), f"{a} + {b} =", str(a + b), _columns(a, b, 1))


def _subtract(rng: random.Random) -> EvalTask:
    b, a = sorted((_operand(rng), _operand(rng)))
    return EvalTask("subtract", _sum_question(rng, f"{a} - {b}"), f"{a} - {b} =", str(a - b), _columns(a, b, -1))


def _columns(a: int, b: int, sign: int) -> str:
    """A sum as one does it on paper, from the right: carry (or borrow) and digit of each column, "(14, 06, 05)".

    With it, every token of the answer needs a few earlier ones; without, the first digit needs all columns at once.
    """
    columns, carry = [], 0
    for place in range(max(len(str(a)), len(str(b)))):
        column = a // 10**place % 10 + sign * (b // 10**place % 10 + carry)
        carry = abs(column // 10)
        columns.append(f"{carry}{column % 10}")
    return f"({', '.join(columns)})"


def _multiply(rng: random.Random) -> EvalTask:
    a, b = rng.randrange(13), rng.randrange(21)
    return EvalTask("multiply", _sum_question(rng, f"{a} * {b}"), f"{a} * {b} =", str(a * b))


_SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]


def _word(rng: random.Random) -> str:
    return "".join(rng.choices(_SYLLABLES, k=rng.randint(1, 3)))


def _name(rng: random.Random) -> str:
    return "".join(rng.choices(_SYLLABLES, k=rng.randint(2, 3))).capitalize()


def _copy(rng: random.Random) -> EvalTask:
    item = rng.choice((_word, lambda r: str(r.randrange(10)), lambda r: r.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ")))
    text = " ".join(item(rng) for _ in range(rng.randint(3, 10)))
    return EvalTask("copy", f"Repeat this line:\n{text}", f"A line:\n{text}\nThe same line:\n", text)


# fmt: off
_THINGS = (
    "apple", "blue", "bread", "cat", "chair", "dog", "fish", "green", "horse", "lamp", "milk", "moon",
    "paper", "red", "river", "rose", "ship", "snow", "stone", "sun", "table", "tree", "white", "wood",
)
# fmt: on


def _lookup(rng: random.Random) -> EvalTask:
    size = rng.randint(3, 8) if rng.random() < 0.85 else rng.randint(9, 16)
    keys = rng.sample(_THINGS, size)
    numbers = rng.random() < 0.5
    values = [str(rng.randrange(10, 1000)) if numbers else rng.choice(_THINGS) for _ in keys]
    wanted = rng.randrange(size)
    table = ", ".join(f"{key} = {value}" for key, value in zip(keys, values, strict=True))
    question = f"Given {table}, what is {keys[wanted]}?"
    return EvalTask("lookup", question, f"{question}\nAnswer:", values[wanted])


_FIELDS: dict[str, Callable[[random.Random], object]] = {
    "name": _name,
    "city": _name,
    "color": lambda rng: rng.choice(_THINGS),
    "item": lambda rng: rng.choice(_THINGS),
    "age": lambda rng: rng.randrange(1, 100),
    "count": lambda rng: rng.randrange(1, 1000),
    "price": lambda rng: rng.randrange(1, 1000),
    "id": lambda rng: rng.randrange(1000, 10000),
    "active": lambda rng: rng.random() < 0.5,
    "ready": lambda rng: rng.random() < 0.5,
}


def _json(rng: random.Random) -> EvalTask:
    fields = rng.sample(sorted(_FIELDS), rng.randint(2, 5))
    record = {field: _FIELDS[field](rng) for field in fields}
    wish = ", ".join(f"{field} = {json.dumps(value)}" for field, value in record.items())
    question = f"Write JSON with {wish}."
    return EvalTask("json", question, f"{question}\nAnswer:", json.dumps(record))


_MAKERS: dict[str, Callable[[random.Random], EvalTask]] = {
    "add": _add,
    "subtract": _subtract,
    "multiply": _multiply,
    "copy": _copy,
    "lookup": _lookup,
    "json": _json,
}
KINDS = tuple(_MAKERS)
