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
from datetime import datetime
from typing import Any, BinaryIO

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


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


class _Generation(Extension):
    """`{% generation %}` marks an assistant's tokens for training; rendering takes only what is inside."""

    tags = {"generation"}  # noqa: RUF012 (declared so by the base class)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    """A namespace that refuses names with underscores, which could reach Python's own."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        names = dict(*rest, **kwargs)
        for name in names:
            _refuse_underscore(name)
        Namespace.__init__(self, names)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: str) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}: it begins with an underscore")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Plain JSON: Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def make_environment() -> ImmutableSandboxedEnvironment:
    """The environment that authors of chat templates expect: transformers' globals, filters and trimming."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "namespace": _Namespace,
    }
    return environment


def takes_parts(environment: jinja2.Environment, source: str) -> bool:
    """Whether a template walks through content in parts, rather than taking it as a string."""
    tree = environment.parse(source)
    aliases = {
        node.target.name
        for node in tree.find_all(nodes.Assign)
        if isinstance(node.target, nodes.Name) and _mentions_content(node.node, set())
    }
    return any(_mentions_content(loop.iter, aliases) for loop in tree.find_all(nodes.For))


def _mentions_content(node: nodes.Node, aliases: set[str]) -> bool:
    match node:
        case nodes.Getattr(attr="content"):
            return True
        case nodes.Getitem(arg=nodes.Const(value="content")):
            return True
        case nodes.Name(name=name):
            return name in aliases
        case nodes.Filter(node=nodes.Node() as inner):
            return _mentions_content(inner, aliases)
    return False


def _render(template: jinja2.Template, context: dict[str, Any], max_chars: int) -> dict[str, Any]:
    pieces: list[str] = []
    size = 0
    for piece in template.generate(**context):
        size += len(piece)
        if size > max_chars:
            return {"error": f"the text grew beyond {max_chars} characters", "kind": "limit"}
        pieces.append(piece)
    return {"text": "".join(pieces)}


def _answer(templates: dict[str, jinja2.Template], request: dict[str, Any]) -> dict[str, Any]:
    """What to send back. Whatever a template raises is a message for its user."""
    try:
        if "sources" in request:
            environment = make_environment()
            sources: dict[str, str] = request["sources"]
            templates.update({name: environment.from_string(source) for name, source in sources.items()})
            return {"takes_parts": {name: takes_parts(environment, source) for name, source in sources.items()}}
        return _render(templates[request["name"]], request["context"], request["max_chars"])
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
