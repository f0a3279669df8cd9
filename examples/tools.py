"""An agent's loop: the model calls tools, this program runs them, until the model answers. Needs `pip install openai`.

powerband serve demo                # in one terminal
python examples/tools.py "What do 12 apples cost?"
"""

from __future__ import annotations

import argparse
import json
import operator
import re
from collections.abc import Callable
from typing import Any

from openai import OpenAI

PRICES = {"apple": 3, "bread": 4, "lamp": 25, "book": 12}
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
MAX_TURNS = 5


def get_price(item: str) -> str:
    """The price of an item."""
    return str(PRICES.get(item, "unknown"))


def calculator(expression: str) -> str:
    """Computes an expression of two numbers."""
    found = re.fullmatch(r"\s*(\d{1,9})\s*([-+*/])\s*(\d{1,9})\s*", expression)
    if found is None:
        return "This calculator takes two whole numbers and one of + - * /."
    a, sign, b = found.groups()
    return "undefined" if sign == "/" and int(b) == 0 else str(OPERATIONS[sign](int(a), int(b)))


TOOLS: dict[str, tuple[Callable[[str], str], str]] = {
    "get_price": (get_price, "item"),
    "calculator": (calculator, "expression"),
}


def described(name: str) -> dict[str, Any]:
    function, parameter = TOOLS[name]
    parameters = {"type": "object", "properties": {parameter: {"type": "string"}}, "required": [parameter]}
    return {
        "type": "function",
        "function": {"name": name, "description": function.__doc__, "parameters": parameters},
    }


def ask(client: OpenAI, question: str) -> str:
    """The model's answer, after as many calls as it makes."""
    messages: list[Any] = [{"role": "user", "content": question}]
    for _ in range(MAX_TURNS):
        reply = client.chat.completions.create(
            model=client.models.list().data[0].id, messages=messages, tools=[described(name) for name in TOOLS]
        )
        message = reply.choices[0].message
        if not message.tool_calls:
            return message.content or ""
        messages.append(message)
        for call in message.tool_calls:
            function, parameter = TOOLS[call.function.name]
            result = function(json.loads(call.function.arguments)[parameter])
            print(f"tool       {call.function.name}({call.function.arguments}) = {result}")
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    return "The model does not come to an answer."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", default="What do 12 apples cost?")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    arguments = parser.parse_args()
    print(f"user       {arguments.question}")
    print(f"assistant  {ask(OpenAI(base_url=arguments.url, api_key='none'), arguments.question)}")


if __name__ == "__main__":
    main()
