"""What `powerband deploy` prints of a verification."""

from __future__ import annotations

from powerband.fleet.verify import Verification
from powerband.metrics.shown import table_lines
from powerband.spec.quantities import count_text

_VERDICTS = {
    "kept": "The promise is kept",
    "broken": "The promise is broken",
    "unclear": "Missed, but by so few requests that it may be chance",
    "invalid": "The run says nothing about the service",
}


def verification_lines(verified: Verification) -> list[str]:
    """Promised beside measured."""
    # A run that says nothing keeps and breaks nothing either.
    is_valid = verified.verdict != "invalid"
    rows = [
        [line.name, line.promised, line.predicted, line.measured, line.verdict if is_valid else ""]
        for line in verified.lines
    ]
    lines = table_lines([["", "promised", "predicted", "measured", ""], *rows])
    errors = f", {verified.errors} failed" if verified.errors else ""
    sent = f"{count_text(verified.requests, 'request')} in {verified.seconds:.0f} s{errors}"
    lines += ["", f"{_VERDICTS[verified.verdict]}: {sent}."]
    if verified.fault:
        lines.append(f"Why: {verified.fault}.")
    missed = [f"{line.name} {line.outside}" for line in verified.lines if line.outside]
    if missed and is_valid:
        lines.append(
            f"Measured outside the predicted band: {', '.join(missed)} ('powerband calibrate' measures again)."
        )
    if verified.verdict == "unclear":
        lines.append("More requests tell more: --verify-seconds.")
    elif verified.verdict == "kept" and 0 < verified.requests < verified.min_requests:
        more = f"{verified.min_requests} tell more: --verify-seconds {verified.min_seconds:g}"
        lines.append(f"So few may keep it by chance; {more}.")
    if verified.report:
        lines.append(f"report: {verified.report}")
    return lines
