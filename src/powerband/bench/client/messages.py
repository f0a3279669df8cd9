"""What the coordinator and its workers say to each other, and what of a run is kept: typed, and encoded by msgspec."""

from __future__ import annotations

from typing import Literal

import msgspec

from powerband.metrics.record import Outcome, RequestRecord
from powerband.spec.workload.workload import AnswerForm

Endpoint = Literal["completions", "chat"]


class ServerAddress(msgspec.Struct, frozen=True, kw_only=True):
    """Where requests go, and what every body holds. base: 'http://host:port' with what precedes '/v1'."""

    base: str
    endpoint: Endpoint
    model: str
    headers: dict[str, str] = {}
    extra: dict[str, object] = {}  # into every body, over what would be there
    form: AnswerForm = "text"  # of the answers, see `answer_forms`
    ignore_eos: bool = True  # as many output tokens as the schedule says
    max_model_len: int | None = None  # tokens of prompt and output together; None: not known
    words_per_token: float = 1.0  # of the prompts that are made up, on this server
    extra_prompt_tokens: int = 0  # that the server adds to a prompt: of its chat template, a first token
    salt: str = ""  # into every text that is made up: another salt, other texts of the same lengths
    insecure: bool = False  # do not check the certificate
    rejected_fields: tuple[str, ...] = ()  # not sent, see `accepted_fields`

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.endpoint == "chat" else "/v1/completions"


class SegmentMessage(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    key: str
    tokens: int
    text: str | None = None


class RequestMessage(msgspec.Struct, frozen=True, array_like=True):
    """As spec.workload.PlannedRequest."""

    index: int
    segments: tuple[SegmentMessage, ...]
    output_tokens: int
    turn: int
    think_s: float


class ChainMessage(msgspec.Struct, frozen=True, array_like=True):
    number: int
    start_s: float
    requests: tuple[RequestMessage, ...]


class WorkerJob(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's share of a run. Times in seconds from the run's start."""

    target: ServerAddress
    chains: tuple[ChainMessage, ...]
    end_s: float  # nothing is scheduled later
    timeout_s: float  # of one request, from its scheduled time
    drain_s: float  # after the last arrival, for what is still being answered
    progress_s: float = 0.25


class StartSignal(msgspec.Struct, frozen=True):
    """start_at: the run's start, on the system's monotonic clock, which all processes share."""

    start_at: float


IN_FLIGHT = "in flight when the load was stopped"  # the error of an aborted request
STOP = b"s"  # after the StartSignal: end the load now; requests in flight are reported as aborted


# Errors that are this client's own limits, not the server's failures: they make a load INVALID.
FILE_LIMIT = "the client may open no more files: raise 'ulimit -n', or load with fewer connections or more --workers"
PORT_LIMIT = "the client has no local port left: load with fewer connections, or widen net.ipv4.ip_local_port_range"
CLIENT_LIMITS = (FILE_LIMIT, PORT_LIMIT)


class Sample(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request as the client saw it. Times in seconds from the run's start."""

    index: int
    chain: int
    turn: int = 0
    scheduled_s: float
    sent_s: float
    chunk_times_s: tuple[float, ...] = ()
    chunk_tokens: tuple[int, ...] = ()
    outcome: Outcome = Outcome.OK
    status: int = 0  # of HTTP; 0: no answer
    error: str = ""
    finish_reason: str = ""
    asked_tokens: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    counted_by: Literal["usage", "chunks"] = "usage"  # who said how many output tokens there were
    ended_s: float | None = None  # when an aborted request was abandoned
    is_valid: bool | None = None  # whether the answer has the form that was asked for; None: of none, or no answer

    def record(self) -> RequestRecord:
        return RequestRecord(
            scheduled_s=self.scheduled_s,
            sent_s=self.sent_s,
            chunk_times_s=self.chunk_times_s,
            chunk_tokens=self.chunk_tokens,
            outcome=self.outcome,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            cached_tokens=self.cached_tokens,
            ended_s=self.ended_s,
            is_valid=self.is_valid,
        )


class WorkerReady(msgspec.Struct, frozen=True, tag=True):
    """The worker has read its job and waits for `Go`."""


class WorkerProgress(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Where a worker is, several times a second, with the samples since its last message."""

    sent: int
    running: int
    samples: tuple[Sample, ...] = ()
    chunks: int = 0  # received so far, with or without tokens
    chunks_in_flight: int = 0  # of these, of requests that have not ended
    cpu_s: float = 0.0  # this process has used


class WorkerDone(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The last message. unsent: requests of its share that were not due before the end, or before the stop."""

    progress: WorkerProgress
    unsent: int


class WorkerFailure(msgspec.Struct, frozen=True, tag=True):
    """The worker cannot go on."""

    message: str


FromWorker = WorkerReady | WorkerProgress | WorkerDone | WorkerFailure
