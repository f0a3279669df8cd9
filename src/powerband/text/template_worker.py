"""The process that renders chat templates: `python -m powerband.text.template_worker`, driven by chat_template.py.

A template comes with a checkpoint and is not trusted. Jinja's sandbox keeps it away from Python's internals, but bounds
neither time nor memory, so it runs here: in a process that is limited by the kernel and can be killed.
Messages on stdin and stdout are JSON behind a length of four bytes, big-endian.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from typing import Any, BinaryIO

import jinja2
from jinja2.exceptions import SecurityError

from powerband.text.template_probes import learn, left_out
from powerband.text.template_sandbox import make_environment

_MAX_PROBE_CHARS = 1 << 20


def read_message(stream: BinaryIO) -> Any:
    """The next message; EOFError when the other side is gone."""
    head = stream.read(4)
    if len(head) < 4:
        raise EOFError
    body = stream.read(int.from_bytes(head, "big"))
    return json.loads(body)


def to_message(value: Any) -> bytes:
    body = json.dumps(value).encode()
    return len(body).to_bytes(4, "big") + body


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


def _limit_this_process(memory_bytes: int) -> None:
    """From here on: bounded memory, no files written, no processes started. Kernels that lack a limit go without."""
    for what, bound in ((resource.RLIMIT_AS, memory_bytes), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        try:
            resource.setrlimit(what, (bound, bound))
        except (ValueError, OSError):
            continue


def main() -> None:
    """Answer requests until stdin closes. SIGALRM ends the process when one takes too long, parent or no parent."""
    memory_bytes, limit_s = int(sys.argv[1]), float(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    _limit_this_process(memory_bytes)
    templates: dict[str, jinja2.Template] = {}
    while True:
        try:
            request = read_message(sys.stdin.buffer)
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        answer = to_message(_answer(templates, request))
        sys.stdout.buffer.write(answer)
        sys.stdout.buffer.flush()
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main()
