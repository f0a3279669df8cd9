"""A few worker processes that render chat templates, each replaced when it overruns its bounds."""

from __future__ import annotations

from typing import Any

from powerband.errors import EnvironmentFault, InvalidRequest
from powerband.worker_process import WorkerLimits, WorkerPool, WorkerProcess

_WORKER = "powerband.text.template_worker"


class TemplateProcesses:
    """Renders in worker processes. Threads may share it. `reads` is by template what template_probes.learn found."""

    def __init__(self, sources: dict[str, str], variables: dict[str, str], limits: WorkerLimits) -> None:
        first = {"sources": sources, "variables": variables}
        self._pool = WorkerPool(lambda: _started(first, limits), limits, what="chat templates")
        self.reads: dict[str, dict[str, Any]] = self._pool.warm_up()["reads"]

    def render(self, name: str, context: dict[str, Any], max_chars: int) -> tuple[str, list[int] | None]:
        """The text, and the first content that it leaves out (as template_probes.left_out has it).

        Blocks for a little more than the time limit, at most twice where a worker was lost. Raises InvalidRequest.
        """
        answer = self._pool.ask({"name": name, "context": context, "max_chars": max_chars})
        if "error" in answer:
            raise InvalidRequest(
                f"The chat template refused these messages: {answer['error'].rstrip('.')}.",
                hint="Check the order of roles and the fields of each message.",
                code="chat_template_limit" if answer["kind"] == "limit" else "chat_template_error",
                param="messages",
            )
        return answer["text"], answer["left_out"]

    def close(self) -> None:
        """End the workers. Renderings in progress finish first."""
        self._pool.close()


def _started(first: dict[str, Any], limits: WorkerLimits) -> WorkerProcess:
    worker = WorkerProcess(_WORKER, first, limits)
    if "error" in worker.answer:
        worker.kill()
        raise EnvironmentFault(
            f"The chat template cannot be used: {worker.answer['error']}.",
            hint="Give another with --chat-template FILE.",
            code="chat_template_invalid",
        )
    return worker
