"""The `powerband` command: parse, call one command, and turn every outcome into a message and an exit code.

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

from cyclopts import (
    App,
    CycloptsError,
    Group,
    MissingArgumentError,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
)

from powerband.errors import PowerbandError

# What other programs call our commands.
_OTHER_NAMES = {
    **dict.fromkeys(("stop", "down", "rm", "delete", "destroy", "undeploy", "uninstall"), "remove"),
    **dict.fromkeys(("ps", "list", "ls", "services"), "status"),
    **dict.fromkeys(("run", "start", "api"), "serve"),
    **dict.fromkeys(("up", "apply"), "deploy"),
    **dict.fromkeys(("benchmark", "load"), "bench"),
    **dict.fromkeys(("check", "info"), "doctor"),
}
USAGE, FAILURE, INTERRUPTED = 2, 4, 130
# Each command's function, and its line in `powerband --help`; its own --help starts with its docstring.
SECTIONS: dict[str, dict[str, tuple[str, str]]] = {
    "One model": {
        "serve": ("powerband.cli.model.serve:serve", "Serve MODEL over an OpenAI-compatible API."),
        "generate": ("powerband.cli.model.generate:generate", "Print the model's answer to a prompt."),
        "memory": ("powerband.cli.model.memory:memory", "Show the memory plan before anything is loaded."),
        "eval": ("powerband.cli.model.eval:evaluate", "Measure accuracy and perplexity of MODEL, by precision."),
    },
    "Plan": {
        "plan": ("powerband.cli.plan.plan:plan", "Predict deployments of MODEL and recommend one."),
        "simulate": ("powerband.cli.plan.simulate:simulate", "Simulate a PLAN under a load."),
        "devices": ("powerband.cli.plan.devices:devices", "Show the catalog of devices."),
        "calibrate": ("powerband.cli.plan.calibrate:calibrate", "Measure this machine, for planning and deadlines."),
    },
    "Operate": {
        "deploy": ("powerband.cli.service.deploy:deploy", "Deploy a PLAN behind a gateway and verify its promise."),
        "status": ("powerband.cli.service.status:status", "Show replicas, load and SLO attainment."),
        "scale": ("powerband.cli.service.scale:scale", "Change the number of replicas."),
        "drain": ("powerband.cli.service.drain:drain", "Stop sending new requests to a replica."),
        "events": ("powerband.cli.service.events:events", "Show crashes, restarts and other events of a service."),
        "logs": ("powerband.cli.service.logs:logs", "Show logs of replicas, gateway and controller."),
        "remove": ("powerband.cli.service.remove:remove", "Stop and remove a service."),
        "incidents": ("powerband.cli.service.incidents:incidents", "Show what puts the SLO at risk, and what to do."),
        "usage": ("powerband.cli.gateway.usage:usage", "Show requests, tokens, latency and cost, by key and model."),
        "audit": ("powerband.cli.gateway.usage:audit", "Show and verify the audit log."),
        "gateway": ("powerband.cli.gateway.gateway:gateway", "Run a gateway for replicas that run elsewhere."),
    },
    "Measure and inspect": {
        "bench": ("powerband.cli.bench.bench:bench", "Send load to an OpenAI-compatible server and measure it."),
        "doctor": ("powerband.cli.doctor:doctor", "Show what this machine has and what is missing."),
        "version": ("powerband.cli.main:print_version", "Show the version."),
    },
}
# Commands with subcommands: their section and their line in `powerband --help`.
GROUPS = {
    "keys": (
        "Operate",
        "Create, list, limit and revoke the API keys of a gateway.",
        {
            "create": "powerband.cli.gateway.keys:create",
            "list": "powerband.cli.gateway.keys:show_all",
            "limit": "powerband.cli.gateway.keys:limit",
            "revoke": "powerband.cli.gateway.keys:revoke",
        },
    ),
    "config": (
        "Measure and inspect",
        "Show the settings in effect and where they come from.",
        {"show": "powerband.cli.config:show"},
    ),
}


def build_app(called: str = "") -> App:
    """The command tree. called: the command on the command line; only its module is imported."""
    sections = {name: Group(name, sort_key=number) for number, name in enumerate(SECTIONS)}
    app = App(
        name="powerband",
        help="Serve open-weight LLMs in the sweet spot of the hardware you have.",
        help_format="plaintext",
        version=_version,
        version_flags=["--version"],
        result_action="return_value",
    )
    options = Group("Options", sort_key=len(SECTIONS))
    app["--help"].group = app["--version"].group = options
    completion = "--install-completion"
    app.command(
        "powerband.cli.completion:install_completion",
        name=completion,
        group=options,
        **_help(completion, called, "Install completion for your shell."),
    )
    for section, commands in SECTIONS.items():
        for name, (path, summary) in commands.items():
            app.command(path, name=name, group=sections[section], **_help(name, called, summary))
    for group, (section, about, inner_commands) in GROUPS.items():
        inner = App(name=group, help=about, group=sections[section])
        for name, path in inner_commands.items():
            own = _help(f"{group} {name}", f"{group} {name}" if called == group else "")
            inner.command(_function(path) if called == group else path, name=name, **own)
        app.command(inner)
    return app


def _help(command: str, called: str, summary: str = "") -> dict[str, str]:
    """What --help shows of a command: its line among the others or, if it is called, the examples beneath its help."""
    if command != called:
        return {"help": summary} if summary else {}
    from powerband.cli.examples import help_examples

    return {"help_epilogue": help_examples(command)}


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
    except KeyboardInterrupt as interrupt:  # with a text where something goes on
        return _complain("interrupted", str(interrupt), INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output closed the pipe. Python would fail again when it flushes at exit.
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
    _check_variables()
    result = command(*bound.args, **bound.kwargs)
    return result if isinstance(result, int) else 0


def _check_variables() -> None:
    """An unknown POWERBAND_ variable is an error of every command, so that a misspelled one does not go unnoticed."""
    if any(name.startswith("POWERBAND_") for name in os.environ):
        from powerband.cli.flags import KNOWN_SETTINGS
        from powerband.spec.settings_layers import check_variables

        check_variables(os.environ, KNOWN_SETTINGS)


def _usage_message(error: CycloptsError) -> tuple[str, str]:
    """(message, hint), reworded where the library's would not help."""
    command = " ".join(["powerband", *(error.command_chain or ())])
    hint = f"'{command} --help' shows the options."
    if isinstance(error, UnusedCliTokensError):
        return f"Unexpected: {' '.join(error.unused_tokens or ())}.", hint
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        option = error.keyword or error.argument.name
        if not option.startswith("--") or option not in (error.root_input_tokens or ()):
            return f"{option} is missing.", hint
        return f"{option} needs a value.", f"A value that begins with '-' is written {option}=VALUE. {hint}"
    if isinstance(error, UnknownOptionError):
        option = (error.token.keyword or error.token.value).partition("=")[0]
        if option == "--model":
            return "The model is given without a flag.", f"Write: {command} MODEL"
        shown = (name for argument in error.argument_collection if argument.show for name in argument.names)
        known = {name.lstrip("-"): name for name in shown}  # hyphens, which all share, make nothing similar
        near = [known[name] for name in difflib.get_close_matches(option.lstrip("-"), known, n=1)]
        return f"Unknown option: {option}.", f"Did you mean {near[0]}?" if near else hint
    if isinstance(error, UnknownCommandError) and not error.command_chain and error.unused_tokens:
        name, commands = error.unused_tokens[0], [*GROUPS, *(one for section in SECTIONS.values() for one in section)]
        near = [_OTHER_NAMES[name]] if name in _OTHER_NAMES else difflib.get_close_matches(name, commands, n=1)
        meant = f"Did you mean 'powerband {near[0]}'? " if near else ""
        return f"Unknown command: {name}.", f"{meant}'powerband --help' shows the commands."
    return str(error), hint


def _complain(message: str, hint: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint:  {hint}", file=sys.stderr)
    return code


def _unexpected(error: Exception) -> int:
    """A defect of ours: print one line, and write the traceback to a file."""
    if os.environ.get("POWERBAND_DEBUG", "0") not in ("", "0"):
        traceback.print_exc()
        return FAILURE
    with tempfile.NamedTemporaryFile("w", prefix="powerband-", suffix=".log", delete=False) as log:
        traceback.print_exc(file=log)
    message = f"Powerband failed unexpectedly: {type(error).__name__}: {error}"
    return _complain(message, f"The traceback is in {log.name}; POWERBAND_DEBUG=1 prints it here.", FAILURE)


def print_version() -> None:
    """Print the version of Powerband. 'powerband doctor' prints those of the packages that it uses."""
    print(_version())


def _version() -> str:
    from importlib.metadata import version

    return f"powerband {version('powerband')}"
