"""How the programs beside this one report: `python openai_client.py URL MODEL` prints a line of JSON for each feature.

They run in environments that have their client and nothing of Powerband. `URL` is the server's, without /v1.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel

URL, MODEL = sys.argv[1:3]
KEY = "none"
HI: list[Any] = [{"role": "user", "content": "What does os.path.join do?"}]
TEXTS = ["What does os.path.join do?", "How is the weather?"]  # to embed
MAX_TOKENS = 60


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Oslo", "Lima", "Pune"]
    days: Literal[1, 2, 3]  # Anthropic's client leaves bounds out of the schema that it sends


PARAMETERS = {**Weather.model_json_schema(), "additionalProperties": False}


# An agent's loop: the model decides by itself to look up a price and then to multiply it.
AGENT_QUESTION = "What do 12 apples cost?"


def get_price(item: str) -> str:
    """The price of an item."""
    return {"apple": "3"}.get(item, "unknown")


def calculator(expression: str) -> str:
    """Computes an expression of two numbers."""
    a, b = expression.split("*")
    return str(int(a) * int(b))


AGENT_TOOLS: dict[str, Callable[..., str]] = {"get_price": get_price, "calculator": calculator}
_AGENT_PARAMETERS = {"get_price": "item", "calculator": "expression"}
MAX_TURNS = 5


def functions() -> list[dict[str, Any]]:
    """The agent's tools as OpenAI describes functions."""
    return [
        {
            "name": name,
            "description": function.__doc__,
            "parameters": {
                "type": "object",
                "properties": {_AGENT_PARAMETERS[name]: {"type": "string"}},
                "required": [_AGENT_PARAMETERS[name]],
                "additionalProperties": False,
            },
        }
        for name, function in AGENT_TOOLS.items()
    ]


def check_agent(answer: str | None) -> None:
    """The answer of the loop."""
    assert "36" in (answer or ""), answer


def feature(name: str) -> Callable[[Callable[[], Any]], None]:
    """Run the function at once; it works unless it raises."""

    def run(check: Callable[[], Any]) -> None:
        problem = ""
        try:
            check()
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"[:500]
        sys.stdout.write(json.dumps({"feature": name, "problem": problem}) + "\n")
        sys.stdout.flush()

    return run


def refusal(call: Callable[[], Any]) -> Exception:
    """The error of a call that has to fail."""
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("this was taken")


def check_weather(arguments: Any) -> None:
    """arguments: an object, its JSON, or a Weather."""
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    Weather.model_validate(arguments.model_dump() if isinstance(arguments, BaseModel) else arguments)
