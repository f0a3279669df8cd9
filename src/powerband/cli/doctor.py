"""`powerband doctor`: what this machine has, what Powerband would use of it and why, and what is missing."""

from __future__ import annotations

import json as json_format
import platform
import time
from dataclasses import asdict
from importlib.metadata import version
from typing import Annotated, Any

from cyclopts import Parameter

from powerband.cli.flags import Json
from powerband.cli.tables import print_table
from powerband.diagnostics import (
    Problem,
    cell,
    compute_report,
    machine_report,
    missing_calibration,
    missing_packages,
    package_versions,
    words,
)
from powerband.engine.kernels.cpu import library

EXIT_ENVIRONMENT = 3
COMPILE_HELP = "Compile the C++ kernels for this processor, which the first start would do, and nothing else"
Compile = Annotated[bool, Parameter(help=COMPILE_HELP, negative="")]


def doctor(*, compile: Compile = False, json: Json = False) -> int:
    """Print what this machine has, what would be used and why, and what is missing.

    Takes a few seconds to load torch and measure memory bandwidth. Exits with 3 if something required is missing.
    """
    if compile:
        return _compile()
    versions = package_versions()
    findings = missing_packages(versions)
    report: dict[str, Any] = {"machine": machine_report()}
    if versions.get("torch"):
        report["compute"] = compute_report(findings)
    findings += missing_calibration()
    report["versions"] = {"powerband": version("powerband"), "python": platform.python_version(), **versions}
    report["findings"] = [asdict(finding) for finding in findings]
    if json:
        print(json_format.dumps(report, indent=2))
    else:
        _print(report, findings)
    return EXIT_ENVIRONMENT if any(finding.fatal for finding in findings) else 0


def _compile() -> int:
    """Raises EnvironmentFault and UsageError."""
    began_s = time.monotonic()
    tier = library.own_tier()
    took = "compiled before" if library.is_compiled() else "compiled in {:.0f} s"
    path = library.compile_own()
    print(f"C++ kernels ({tier}), {took.format(time.monotonic() - began_s)}: {path}")
    return 0


def _print(report: dict[str, Any], findings: list[Problem]) -> None:
    for title in ("machine", "compute", "versions"):
        if title in report:
            print(title)
            print_table([("  " + words(key), cell(key, value)) for key, value in report[title].items()])
    print("findings" if findings else "findings: none, this machine is ready")
    for finding in findings:
        print(f"  {finding.problem}\n    {finding.remedy}")
