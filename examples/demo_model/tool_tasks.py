"""Conversations with tools: what the demo model learns about calling them.

A conversation offers one to four tools. The user asks for something that one of them does, that two of them do one
after the other, or that none does; then the model answers by itself. Names, parameters and descriptions vary, so that
the model reads them instead of remembering them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from powerband.text.eval_tasks import eval_tasks

Message = dict[str, Any]
Tool = dict[str, Any]

_SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
# fmt: off
_CITIES = (
    "Paris", "London", "Berlin", "Tokyo", "New York", "Rome", "Madrid", "Oslo", "Lima", "Cairo", "San Francisco",
    "Boston", "Vienna", "Prague", "Lisbon", "Dublin", "Athens", "Moscow", "Delhi", "Seoul", "Sydney", "Toronto",
    "Chicago", "Zurich",
)
_THINGS = (
    "apple", "bread", "chair", "lamp", "milk", "paper", "rose", "ship", "table", "wood", "book", "pen", "shoe", "cup",
    "phone", "bike", "coat", "door", "egg", "hat", "key", "ring", "soap", "tea", "coffee", "laptop", "ticket", "pizza",
)
# fmt: on


def _name(rng: random.Random) -> str:
    return "".join(rng.choices(_SYLLABLES, k=rng.randint(2, 3))).capitalize()


def _words(rng: random.Random) -> str:
    return " ".join("".join(rng.choices(_SYLLABLES, k=rng.randint(1, 3))) for _ in range(rng.randint(1, 4)))


def _city(rng: random.Random) -> str:
    return rng.choice(_CITIES) if rng.random() < 0.6 else _name(rng)


def _thing(rng: random.Random) -> str:
    return rng.choice(_THINGS)


def _formula(rng: random.Random) -> str:
    a, b = (rng.randrange(10 ** rng.randint(1, 5)) for _ in range(2))
    return f"{a} {rng.choice('+-*/')} {b}"


@dataclass(frozen=True, slots=True)
class Need:
    """One thing that users want, the tools that give it, and what comes back."""

    tools: tuple[str, ...]
    parameter: tuple[str, ...]
    about: tuple[str, ...]
    questions: tuple[str, ...]
    value: Callable[[random.Random], str]
    result: Callable[[random.Random], object]
    fields: tuple[str, ...] = ()  # names of the result's fields, where it is an object


def _number(rng: random.Random) -> object:
    return rng.randrange(10 ** rng.randint(1, 4))


NEEDS: dict[str, Need] = {
    "formula": Need(
        ("calculator", "calculate", "compute", "calc", "math"),
        ("expression", "formula", "input"),
        ("Computes an expression.", "A calculator.", "Evaluates a formula.", "Do the math.", ""),
        ("What is {}?", "Calculate {}.", "Compute {}.", "How much is {}?", "Please calculate {}."),
        _formula,
        _number,
        ("result", "value"),
    ),
    "weather": Need(
        ("get_weather", "weather", "current_weather", "get_current_weather", "getWeather"),
        ("city", "location", "place"),
        ("The weather in a city.", "Get the current weather.", "Get the weather in a given location.", "Weather.", ""),
        ("What is the weather in {}?", "How is the weather in {}?", "What's the weather like in {}?", "Weather in {}?"),
        _city,
        lambda rng: rng.choice(("sunny", "rain", "snow", "cloudy", "wind", "18 degrees", "sunny, 21 degrees", "-3 C")),
        ("weather", "sky", "temperature"),
    ),
    "time": Need(
        ("get_time", "current_time", "clock"),
        ("city", "location", "place", "timezone"),
        ("The time in a city.", "Get the current time.", "Local time.", ""),
        ("What time is it in {}?", "What is the time in {}?", "Tell me the time in {}."),
        _city,
        lambda rng: f"{rng.randrange(24):02}:{rng.randrange(60):02}",
        ("time", "now"),
    ),
    "price": Need(
        ("get_price", "price", "price_of", "find_price"),
        ("item", "product", "name"),
        ("The price of an item.", "Get the price of a product.", "Prices.", ""),
        ("What does the {} cost?", "What is the price of {}?", "How much is the {}?", "Price of {}?"),
        _thing,
        _number,
        ("price", "cost"),
    ),
    "stock": Need(
        ("get_stock", "stock", "inventory", "count_items"),
        ("item", "product", "name"),
        ("How many of an item are in stock.", "Get the stock of a product.", "Inventory.", ""),
        ("How many {}s are in stock?", "Is there any {} in stock?", "Stock of {}?"),
        _thing,
        _number,
        ("stock", "count"),
    ),
    "age": Need(
        ("get_age", "age_of", "find_age"),
        ("name", "person", "user"),
        ("The age of a person.", "Get a person's age.", ""),
        ("How old is {}?", "What is the age of {}?", "Tell me the age of {}."),
        _name,
        lambda rng: rng.randrange(1, 100),
        ("age", "years"),
    ),
    "look_up": Need(
        ("look_up", "lookup", "search", "find", "search_web", "get_definition"),
        ("key", "query", "word", "term", "q"),
        ("Looks something up.", "Search for a text.", "Find a word.", "Search the web.", ""),
        ("Look up {}.", "Search for {}.", "Find {}.", "Please look up {}."),
        _words,
        lambda rng: _words(rng) if rng.random() < 0.5 else _number(rng),
        ("result", "value", "text"),
    ),
}
_INSTRUCTIONS = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "Use the tools that you have. Do not guess.",
    "Be precise.",
)
_TYPES: dict[str, Callable[[random.Random], object]] = {
    "string": lambda rng: rng.choice((_name, _thing, _words, _city))(rng),
    "integer": lambda rng: rng.randrange(10 ** rng.randint(1, 4)),
    "number": lambda rng: rng.choice((rng.randrange(1000), rng.randrange(1000) / 10)),
    "boolean": lambda rng: rng.random() < 0.5,
}
_PARAMETERS = (
    "name",
    "city",
    "color",
    "item",
    "age",
    "count",
    "price",
    "id",
    "to",
    "text",
    "unit",
    "date",
    "a",
    "b",
    "x",
)


@dataclass(slots=True)
class _Offer:
    """A tool that a conversation offers for a need, under names drawn for it."""

    need: Need
    name: str
    parameter: str
    shape: str  # of its results: text, object, or a field of this name
    extra: dict[str, str] = field(default_factory=dict)  # optional parameters, which a call leaves out

    @classmethod
    def drawn(cls, rng: random.Random, need: Need) -> _Offer:
        extra = {"unit": "string"} if rng.random() < 0.1 else {}
        shape = rng.choice(("", "", rng.choice(need.fields)))
        return cls(need, rng.choice(need.tools), rng.choice(need.parameter), shape, extra)

    def tool(self, rng: random.Random) -> Tool:
        properties = {self.parameter: {"type": "string"}} | {name: {"type": t} for name, t in self.extra.items()}
        return _tool(self.name, rng.choice(self.need.about), properties, [self.parameter])

    def result(self, rng: random.Random) -> tuple[str, str]:
        """(what the tool returns, what the model is to read out of it)"""
        value = self.need.result(rng)
        return (json.dumps({self.shape: value}) if self.shape else str(value)), str(value)


def _tool(name: str, about: str, properties: dict[str, Any], required: list[str]) -> Tool:
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": about, "parameters": parameters}}


def _call(name: str, arguments: dict[str, object]) -> Message:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def _calls(*calls: Message) -> Message:
    return {"role": "assistant", "content": "", "tool_calls": list(calls)}


def conversations(seed: int) -> Iterator[tuple[list[Message], list[Tool]]]:
    """An endless stream of (messages, tools); the same seed gives the same stream."""
    rng = random.Random(f"tools/{seed}")
    direct = [eval_tasks(kind, seed, held_out=False) for kind in ("add", "subtract", "copy", "json", "lookup")]
    while True:
        kind = rng.choices(("one", "named", "two", "both", "none"), weights=(10, 4, 4, 2, 3))[0]
        messages, tools = _MAKERS[kind](rng, direct)
        if rng.random() < 0.2:
            messages = [{"role": "system", "content": rng.choice((*_INSTRUCTIONS, _words(rng)))}, *messages]
        yield messages, tools


def _one(rng: random.Random, _direct: list[Any]) -> tuple[list[Message], list[Tool]]:
    """Questions that one tool answers, one after the other."""
    offers = [_Offer.drawn(rng, NEEDS[need]) for need in rng.sample(sorted(NEEDS), rng.randint(1, 4))]
    messages: list[Message] = []
    for _ in range(rng.choice((1, 1, 1, 2))):
        offer = rng.choice(offers)
        value = offer.need.value(rng)
        returned, read = offer.result(rng)
        messages += [
            {"role": "user", "content": rng.choice(offer.need.questions).format(value)},
            _calls(_call(offer.name, {offer.parameter: value})),
            {"role": "tool", "content": returned},
            {"role": "assistant", "content": f"It is {read}."},
        ]
    return messages, [offer.tool(rng) for offer in offers]


def _named(rng: random.Random, _direct: list[Any]) -> tuple[list[Message], list[Tool]]:
    """A tool that the user calls by its name, with the values of its parameters."""
    tools, schemas = [], []
    for _ in range(rng.randint(1, 3)):
        name = "_".join("".join(rng.choices(_SYLLABLES, k=rng.randint(1, 2))) for _ in range(rng.randint(1, 2)))
        types = {parameter: rng.choice(sorted(_TYPES)) for parameter in rng.sample(_PARAMETERS, rng.randint(1, 4))}
        schemas.append((name, types))
        tools.append(_tool(name, rng.choice(("", "Does it.")), {p: {"type": t} for p, t in types.items()}, list(types)))
    name, types = rng.choice(schemas)
    arguments = {parameter: _TYPES[type_](rng) for parameter, type_ in types.items()}
    wish = ", ".join(f"{parameter} = {json.dumps(value)}" for parameter, value in arguments.items())
    result = rng.choice(("ok", "done", str(_number(rng)), _words(rng)))
    return [
        {"role": "user", "content": rng.choice(("Call {} with {}.", "Use {} with {}.")).format(name, wish)},
        _calls(_call(name, arguments)),
        {"role": "tool", "content": result},
        {"role": "assistant", "content": f"It is {result}."},
    ], tools


def _two(rng: random.Random, _direct: list[Any]) -> tuple[list[Message], list[Tool]]:
    """A price, and then the product with it: the second call needs the first one's result."""
    price, calculator = _Offer.drawn(rng, NEEDS["price"]), _Offer.drawn(rng, NEEDS["formula"])
    others = [_Offer.drawn(rng, NEEDS[need]) for need in rng.sample(("weather", "time", "age"), rng.randint(0, 1))]
    thing, count = _thing(rng), rng.randint(2, 99)
    returned, each = price.result(rng)
    product = int(each) * count
    offers = [price, calculator, *others]
    rng.shuffle(offers)
    question = rng.choice(("What do {} {}s cost?", "How much are {} {}s?", "What is the price of {} {}s?"))
    total = json.dumps({calculator.shape: product}) if calculator.shape else str(product)
    return [
        {"role": "user", "content": question.format(count, thing)},
        _calls(_call(price.name, {price.parameter: thing})),
        {"role": "tool", "content": returned},
        _calls(_call(calculator.name, {calculator.parameter: f"{count} * {each}"})),
        {"role": "tool", "content": total},
        {"role": "assistant", "content": f"It is {product}."},
    ], [offer.tool(rng) for offer in offers]


def _both(rng: random.Random, _direct: list[Any]) -> tuple[list[Message], list[Tool]]:
    """Two calls at once."""
    needs = rng.sample(sorted(NEEDS), rng.randint(1, 3))
    offers = [_Offer.drawn(rng, NEEDS[need]) for need in needs]
    offer = rng.choice(offers)
    values = [offer.need.value(rng) for _ in range(2)]
    question = rng.choice(offer.need.questions).format(" and ".join(values))
    returned = [offer.result(rng) for _ in range(2)]
    return [
        {"role": "user", "content": question},
        _calls(*(_call(offer.name, {offer.parameter: value}) for value in values)),
        *({"role": "tool", "content": text} for text, _ in returned),
        {"role": "assistant", "content": f"It is {returned[0][1]} and {returned[1][1]}."},
    ], [offer.tool(rng) for offer in offers]


def _none(rng: random.Random, direct: list[Any]) -> tuple[list[Message], list[Tool]]:
    """Something that no tool does: the model answers by itself."""
    needs = rng.sample(sorted(NEEDS.keys() - {"formula", "look_up"}), rng.randint(1, 3))
    exercise = next(rng.choice(direct))
    messages = [{"role": "user", "content": exercise.question}, {"role": "assistant", "content": exercise.reply}]
    if rng.random() < 0.2:
        messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello! Ask me something."}]
    return messages, [_Offer.drawn(rng, NEEDS[need]).tool(rng) for need in needs]


_MAKERS = {"one": _one, "named": _named, "two": _two, "both": _both, "none": _none}
