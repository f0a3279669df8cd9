"""Turns strangers' specifications into grammars, in worker processes; results and refusals are kept by content."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import msgspec

from powerband.core.structured_outputs import StructuredOutputsParams
from powerband.errors import EnvironmentFault, InvalidRequest
from powerband.structured.tokens import not_available
from powerband.text.tokenizer import Tokenizer
from powerband.worker_process import WorkerLimits, WorkerPool, WorkerProcess

_WORKER = "powerband.structured.worker"
LIMITS = WorkerLimits(seconds=0.7, memory_bytes=512 << 20, max_workers=2)
_MAX_KEPT_BYTES = 16 << 20


class GrammarCompiler:
    """Threads may share it. The first request starts a worker, which takes some tenths of a second."""

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int], limits: WorkerLimits = LIMITS
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._limits = limits
        self._pool = WorkerPool(self._started, limits, what="grammars", is_retried=False)
        self._kept: OrderedDict[bytes, dict[str, Any]] = OrderedDict()
        self._num_bytes = 0
        self._refusal = ""  # of the tokenizer, which no worker can read
        self._lock = threading.Lock()

    def grammar(self, outputs: StructuredOutputsParams, places: Mapping[str, str] | None = None) -> str:
        """The grammar of what a request asks for. Raises InvalidRequest naming the place, or for a tokenizer with which
        there are no grammars, and EnvironmentFault.

        Blocks until it is compiled: for a second at most, or some where the cores are busy. places: what errors call
        the fields of `outputs`.
        """
        given = {item.name: getattr(outputs, item.name) for item in fields(outputs)}
        request = {"outputs": given, "places": dict(places or {})}
        try:
            key = hashlib.sha256(msgspec.json.encode(request)).digest()
        except RecursionError:
            place = f"structured_outputs.{outputs.kind}"
            raise InvalidRequest(f"'{place}' is nested too deeply.", param=place) from None
        with self._lock:
            answer = self._kept.get(key)
            if answer is not None:
                self._kept.move_to_end(key)
        if answer is None:
            answer = self._ask(request)
            if answer.get("kind") != "limit":  # which a busy machine may be the cause of
                self._keep(key, answer)
        if "grammar" in answer:
            grammar: str = answer["grammar"]
            return grammar
        if answer["kind"] == "refused":
            raise InvalidRequest(answer["error"], hint=answer["hint"], param=answer["param"], code=answer["code"])
        place = request["places"].get(outputs.kind, f"structured_outputs.{outputs.kind}")
        raise InvalidRequest(
            f"'{place}' cannot be compiled: {answer['error']}.",
            hint="Make it smaller or simpler: fewer and shorter repetitions, fewer alternatives.",
            param=place,
            code="grammar_limit",
        )

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if not self._refusal:
            try:
                return self._pool.ask(request)
            except EnvironmentFault:
                if not self._refusal:
                    raise
        raise not_available(self._refusal)

    def close(self) -> None:
        """End the workers."""
        self._pool.close()

    def _keep(self, key: bytes, answer: dict[str, Any]) -> None:
        with self._lock:
            if key not in self._kept:
                self._kept[key] = answer
                self._num_bytes += _size(answer)
            while self._num_bytes > _MAX_KEPT_BYTES:
                _, dropped = self._kept.popitem(last=False)
                self._num_bytes -= _size(dropped)

    def _started(self) -> WorkerProcess:
        first = {
            "tokenizer": self._tokenizer.to_json(),
            "vocab_size": self._vocab_size,
            "eos_token_ids": self._eos_token_ids,
        }
        worker = WorkerProcess(_WORKER, first, self._limits)
        if "error" in worker.answer:
            worker.kill()
            if worker.answer["kind"] == "refused":
                self._refusal = worker.answer["error"]
            raise EnvironmentFault(
                f"The tokenizer for grammars is not ready: {worker.answer['error']}.", hint="Try again in a moment."
            )
        return worker


def _size(answer: dict[str, Any]) -> int:
    return 256 + sum(len(value) for value in answer.values() if isinstance(value, str))
