"""The process that renders chat templates: `python -m powerband.text.template_worker`, driven by chat_template.py.

A template comes with a checkpoint and is not trusted. Jinja's sandbox keeps it away from Python's internals, but bounds
neither time nor memory, so it runs here: in a process that is limited by the kernel and can be killed.
"""

from __future__ import annotations

import sys
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError

from powerband.text.template_probes import learn, left_out
from powerband.text.template_sandbox import make_environment
from powerband.worker_loop import answer_requests, limit_this_process

_MAX_PROBE_CHARS = 1 << 20


def _render(template: jinja2.Template, context: dict[str, Any], max_chars: int) -> dict[str, Any]:
    pieces: list[str] = []
    size = 0
    for piece in template.generate(**context):
        size += len(piece)
        if size > max_chars:
            return {"error": f"the text grew beyond {max_chars} characters", "kind": "limit"}
        pieces.append(piece)
    return {"text": "".join(pieces)}


def _written(template: jinja2.Template, context: dict[str, Any], max_chars: int) -> str | None:
    """The text, or None where the template raises an error or writes too much."""
    try:
        return _render(template, context, max_chars).get("text")
    except Exception:  # a template can raise anything that Python's operators raise
        return None


def _loaded(templates: dict[str, jinja2.Template], request: dict[str, Any]) -> dict[str, Any]:
    environment = make_environment()
    sources: dict[str, str] = request["sources"]
    templates.update({name: environment.from_string(source) for name, source in sources.items()})
    variables: dict[str, str] = request["variables"]

    def learnt(template: jinja2.Template) -> dict[str, Any]:
        return learn(lambda context: _written(template, {**variables, **context}, _MAX_PROBE_CHARS))

    return {"reads": {name: learnt(template) for name, template in templates.items()}}


def _rendered(template: jinja2.Template, context: dict[str, Any], max_chars: int) -> dict[str, Any]:
    answer = _render(template, context, max_chars)
    if "text" in answer:
        answer["left_out"] = left_out(lambda marked: _written(template, marked, max_chars), context)
    return answer


def _answer(templates: dict[str, jinja2.Template], request: dict[str, Any]) -> dict[str, Any]:
    """What to send back. Whatever a template raises is a message for its user."""
    try:
        if "sources" in request:
            return _loaded(templates, request)
        return _rendered(templates[request["name"]], request["context"], request["max_chars"])
    except MemoryError:
        return {"error": "it needed more memory than a chat template may use", "kind": "limit"}
    except SecurityError as error:
        return {"error": f"it tried what a template may not do: {error}", "kind": "security"}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: {error.message}", "kind": "syntax"}
    except RecursionError:
        return {"error": "it is nested too deeply", "kind": "limit"}
    except Exception as error:  # a template can raise anything that Python's operators raise
        return {"error": str(error) or type(error).__name__, "kind": "template"}


def main() -> None:
    """Answer requests until stdin closes, within the bounds that the arguments give."""
    memory_bytes, limit_s = int(sys.argv[1]), float(sys.argv[2])
    limit_this_process(memory_bytes)
    templates: dict[str, jinja2.Template] = {}
    answer_requests(lambda request: _answer(templates, request), limit_s)


if __name__ == "__main__":
    main()
