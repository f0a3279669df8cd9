"""Packages that only some commands need, and the extra of powerband that installs each."""

from __future__ import annotations

from importlib.machinery import ModuleSpec
from importlib.util import find_spec

from powerband.errors import EnvironmentFault

EXTRAS = {"torch": "serve", "scipy": "serve", "opentelemetry": "otel"}
WITHOUT_TORCH = "serve, generate, eval, calibrate and deploying Powerband's own engine"


class MissingPackage(EnvironmentFault, ImportError):
    """A package of an extra is not installed. Also an ImportError, for `from powerband import LLM`."""


def is_installed(package: str) -> bool:
    """Whether `package` can be imported, without importing it."""
    return find_spec(package) is not None


def require(package: str, purpose: str) -> ModuleSpec:
    """Where `package` is installed, without importing it. Raises MissingPackage if it is not.

    purpose: what needs it, the subject of the message, such as 'Calibration'.
    """
    found = find_spec(package)
    if found is None:
        raise missing(package, purpose)
    return found


def missing(package: str, purpose: str) -> MissingPackage:
    return MissingPackage(f"{purpose} needs {package}, which is not installed.", hint=f"Run: {pip_command(package)}")


def pip_command(package: str) -> str:
    return f"pip install 'powerband[{EXTRAS[package]}]'"
