"""The `powerband` command: parses, calls one command, and turns every ending into a message and an exit code.

0 ok · 1 promise not met · 2 usage · 3 environment · 4 run-time failure · 130 interrupted.
Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence

from cyclopts import App, CycloptsError, UnknownOptionError, UnusedCliTokensError

from powerband.errors import PowerbandError

USAGE, FAILURE, INTERRUPTED = 2, 4, 130
COMMANDS = {
    "serve": "powerband.cli.serve:serve",
    "gateway": "powerband.cli.gateway:gateway",
    "generate": "powerband.cli.generate:generate",
    "memory": "powerband.cli.memory:memory",
    "eval": "powerband.cli.eval:evaluate",
    "bench": "powerband.cli.bench:bench",
    "devices": "powerband.cli.devices:devices",
    "plan": "powerband.cli.plan:plan",
    "deploy": "powerband.cli.deploy:deploy",
    "scale": "powerband.cli.scale:scale",
    "drain": "powerband.cli.drain:drain",
    "logs": "powerband.cli.logs:logs",
    "status": "powerband.cli.status:status",
    "incidents": "powerband.cli.incidents:incidents",
    "remove": "powerband.cli.remove:remove",
    "simulate": "powerband.cli.simulate:simulate",
    "calibrate": "powerband.cli.calibrate:calibrate",
    "usage": "powerband.cli.usage:usage",
    "audit": "powerband.cli.usage:audit",
    "doctor": "powerband.cli.doctor:doctor",
}
# Commands of commands, with what they say of themselves.
GROUPS = {
    "keys": (
        "Create, list, limit and revoke the API keys of a gateway.",
        {
            "create": "powerband.cli.keys:create",
            "list": "powerband.cli.keys:show_all",
            "limit": "powerband.cli.keys:limit",
            "revoke": "powerband.cli.keys:revoke",
        },
    ),
    "config": (
        "Show the settings in effect and where they come from.",
        {"show": "powerband.cli.config:show"},
    ),
}


def build_app(called: str = "") -> App:
    """The command tree. `called`: the only command whose module has to be imported; none of them: all, for their help.

    No module behind it imports anything heavy before it runs.
    """
    one = called in (*GROUPS, *COMMANDS)
    app = App(
        name="powerband",
        help="Serve open-weight LLMs in the sweet spot of the hardware you have.",
        help_format="plaintext",
        version=_version,
        version_flags=["--version"],
        result_action="return_value",
    )
    for name, path in COMMANDS.items():
        app.command(path if one else _function(path), name=name)
    for group, (about, commands) in GROUPS.items():
        inner = App(name=group, help=about)
        for name, path in commands.items():
            inner.command(path if one and called != group else _function(path), name=name)
        app.command(inner)
    return app


def _function(path: str) -> Callable[..., object]:
    module, _, name = path.partition(":")
    function: Callable[..., object] = getattr(importlib.import_module(module), name)
    return function


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's) and return its exit code."""
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _run(tokens)
        sys.stdout.flush()
        return code
    except PowerbandError as error:
        return _complain(error.message, error.hint, error.exit_code)
    except KeyboardInterrupt:
        return _complain("interrupted", "", INTERRUPTED)
    except BrokenPipeError:
        # Whoever read our output has enough of it. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return _unexpected(error)


def _run(tokens: list[str]) -> int:
    app = build_app(tokens[0] if tokens else "")
    try:
        command, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        return _complain(*_usage_message(error), USAGE)
    result = command(*bound.args, **bound.kwargs)
    return result if isinstance(result, int) else 0


def _usage_message(error: CycloptsError) -> tuple[str, str]:
    """(message, hint), in words of ours where the library's would not help."""
    command = " ".join(["powerband", *(error.command_chain or ())])
    hint = f"'{command} --help' shows what there is."
    if isinstance(error, UnusedCliTokensError):
        return f"Unexpected: {' '.join(error.unused_tokens or ())}.", hint
    if isinstance(error, UnknownOptionError):
        option = (error.token.keyword or error.token.value).partition("=")[0]
        if option == "--model":
            return "The model is given without a flag.", f"Write: {command} MODEL"
        known = [name for argument in error.argument_collection for name in argument.names]
        near = difflib.get_close_matches(option, known, n=1)
        return f"Unknown option: {option}.", f"Did you mean {near[0]}?" if near else hint
    return str(error), hint


def _complain(message: str, hint: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint:  {hint}", file=sys.stderr)
    return code


def _unexpected(error: Exception) -> int:
    """A defect of ours: say so briefly, and keep the traceback where it can be found."""
    if os.environ.get("POWERBAND_DEBUG", "0") not in ("", "0"):
        traceback.print_exc()
        return FAILURE
    with tempfile.NamedTemporaryFile("w", prefix="powerband-", suffix=".log", delete=False) as log:
        traceback.print_exc(file=log)
    message = f"Powerband failed unexpectedly: {type(error).__name__}: {error}"
    return _complain(message, f"The traceback is in {log.name}; POWERBAND_DEBUG=1 prints it here.", FAILURE)


def _version() -> str:
    from importlib.metadata import version

    return f"powerband {version('powerband')}"
