"""`powerband doctor`: what this machine has, what Powerband would use of it and why, and what is missing."""

from __future__ import annotations

import json as json_format
import platform
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from powerband.cli.flags import Json
from powerband.cli.tables import print_table
from powerband.cost.sizing import readable
from powerband.diagnostics import Problem, compute_report, machine_report, missing_packages, package_versions

EXIT_ENVIRONMENT = 3


def doctor(*, json: Json = False) -> int:
    """Print what this machine has, what would be used and why, and what is missing.

    Takes a few seconds to load torch and measure memory bandwidth. Exits with 3 if something required is missing.
    """
    versions = package_versions()
    findings = missing_packages(versions)
    report: dict[str, Any] = {"machine": machine_report()}
    if versions.get("torch"):
        report["compute"] = compute_report(findings)
    report["versions"] = {"powerband": version("powerband"), "python": platform.python_version(), **versions}
    report["findings"] = [asdict(finding) for finding in findings]
    if json:
        print(json_format.dumps(report, indent=2))
    else:
        _print(report, findings)
    return EXIT_ENVIRONMENT if any(finding.fatal for finding in findings) else 0


def _print(report: dict[str, Any], findings: list[Problem]) -> None:
    for title in ("machine", "compute", "versions"):
        if title in report:
            print(title)
            print_table([("  " + _words(key), _cell(key, value)) for key, value in report[title].items()])
    print("findings" if findings else "findings: none, this machine is ready")
    for finding in findings:
        print(f"  {finding.problem}\n    {finding.remedy}")


def _words(key: str) -> str:
    return key.removesuffix("_bytes_per_s").removesuffix("_bytes").replace("_", " ")


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "not found"
    if key.endswith("_bytes_per_s"):
        return f"{value / 1e9:.1f} GB/s"
    if key.endswith("_bytes"):
        return readable(value)
    if key == "gpus":
        return ", ".join(f"{gpu['name']} ({readable(gpu['memory_bytes'])})" for gpu in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(value) or "none known" if isinstance(value, list) else str(value)
