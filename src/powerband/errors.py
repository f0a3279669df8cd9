"""The errors a user can meet. Each says what is wrong, with which value, and what to do about it."""

from __future__ import annotations


class PowerbandError(Exception):
    """Base of every expected error: `code` for programs, `message` and `hint` for people.

    `param` names the request field or setting at fault, when there is one.
    `exit_code` is what the command line returns; `http_status` what the API answers, with `retry_after_s` where it is
    worth trying again.
    """

    exit_code = 4
    http_status = 500
    default_code = "internal_error"
    retry_after_s: float | None = None

    def __init__(self, message: str, *, hint: str = "", code: str = "", param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code or self.default_code
        self.param = param

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".rstrip()


class UsageError(PowerbandError):
    """A setting, option or argument is wrong (exit 2)."""

    exit_code = 2
    http_status = 400
    default_code = "usage_error"


class EnvironmentFault(PowerbandError):
    """This machine lacks something: a file, memory, a device, a package (exit 3)."""

    exit_code = 3
    http_status = 503
    default_code = "environment_error"


class InvalidRequest(PowerbandError):
    """A request is wrong and would be wrong again (HTTP 400)."""

    exit_code = 2
    http_status = 400
    default_code = "invalid_request"


class RequestTooLong(InvalidRequest):
    """A request can never fit: the context or the whole KV cache is smaller."""

    default_code = "context_length_exceeded"

    def __init__(self, message: str, *, limit: int, hint: str = "", param: str | None = None) -> None:
        super().__init__(message, hint=hint, param=param)
        self.limit = limit


class QueueFull(PowerbandError):
    """The engine has as much waiting work as it may accept (HTTP 429 with Retry-After)."""

    http_status = 429
    default_code = "queue_full"

    def __init__(self, message: str, *, retry_after_s: float, hint: str = "", code: str = "") -> None:
        super().__init__(message, hint=hint, code=code)
        self.retry_after_s = retry_after_s


class EngineDead(PowerbandError):
    """The engine process ended or stopped answering while a request was with it (HTTP 503)."""

    http_status = 503
    default_code = "engine_dead"
