"""Messages between API process and engine process: typed values, as msgpack over private unix sockets.

    API process                                      engine process
      PUSH ───── Submit AbortRequests MethodCall ──►  PULL   requests.sock
      PULL  ◄─── Phase Ready Failed Outputs ────────  PUSH   outputs.sock
                 Heartbeat CallResult

Bytes that do not decode to one of these are counted and dropped; nothing that arrives is ever executed as code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, Literal

import msgspec

from powerband.core.params import SamplingParams
from powerband.core.request import EngineRequest
from powerband.core.stats import SchedulerStats
from powerband.core.step import ErrorInfo, TokenOutput
from powerband.errors import PowerbandError
from powerband.spec.model.pooling import PoolingSpec
from powerband.spec.settings import EngineSettings

REQUESTS_SOCKET = "requests.sock"
OUTPUTS_SOCKET = "outputs.sock"


class StartupConfig(msgspec.Struct):
    """What the engine's process reads from its standard input, as one line of JSON. Its end ends the process."""

    settings: EngineSettings
    folder: str  # of the two sockets
    log_level: str
    log_format: Literal["text", "json"]


# ---- to the engine


class Submit(msgspec.Struct, tag=True):
    """Requests that share all but their id, prompt and seed: what they share crosses once, and is shared here too.

    others: of each further request its id, the index of its prompt (0: that of the first; 1: prompts[0]), and its seed.
    """

    first: EngineRequest
    prompts: list[list[int]] = []
    others: list[tuple[str, int, int | None]] = []

    @classmethod
    def of(cls, requests: Sequence[EngineRequest]) -> list[Submit]:
        """The requests in order, in as few messages as possible."""
        messages: list[Submit] = []
        indices: dict[int, int] = {}  # of the last message's prompts, by identity
        for request in requests:
            if not messages or not _share(messages[-1].first, request):
                messages.append(cls(request))
                indices = {id(request.token_ids): 0}
                continue
            message = messages[-1]
            index = indices.setdefault(id(request.token_ids), len(indices))
            if index > len(message.prompts):
                message.prompts.append(request.token_ids)
            message.others.append((request.id, index, request.params.seed))
        return messages

    def requests(self) -> Iterator[EngineRequest]:
        """Yields each request when it is needed."""
        first = self.first
        yield first
        for id, index, seed in self.others:
            params = first.params if seed == first.params.seed else first.params.with_seed(seed)
            prompt = self.prompts[index - 1] if index else first.token_ids
            yield replace(first, id=id, token_ids=prompt, params=params)


class AbortRequests(msgspec.Struct, tag=True):
    ids: list[str]


class MethodCall(msgspec.Struct, tag=True):
    """Run an administrative method; answered by a CallResult with the same `call_id`."""

    call_id: int
    method: str
    kwargs: dict[str, Any]


ToEngine = Submit | AbortRequests | MethodCall


def _share(a: EngineRequest, b: EngineRequest) -> bool:
    """Whether they differ only in id, prompt and seed. By identity: comparing long lists would cost too much."""
    return all(getattr(a, name) is getattr(b, name) for name in _SHARED_FIELDS) and (
        a.params is b.params or all(getattr(a.params, name) is getattr(b.params, name) for name in _SHARED_PARAMS)
    )


_SHARED_FIELDS = [field.name for field in fields(EngineRequest) if field.name not in ("id", "token_ids", "params")]
_SHARED_PARAMS = [field.name for field in fields(SamplingParams) if field.name != "seed"]


# ---- from the engine


class AdapterInfo(msgspec.Struct):
    """A LoRA adapter that is loaded."""

    name: str
    source: str  # as it was given: a folder, or a Hugging Face id
    digest: str  # of its content; `EngineRequest.adapter`
    rank: int
    memory_bytes: int


class EngineInfo(msgspec.Struct, kw_only=True):
    """What the API needs to know of a started engine."""

    model_folder: str  # the folder of config.json and the tokenizer
    max_model_len: int
    vocab_size: int  # width of the logits: larger token ids do not exist
    eos_token_ids: list[int]  # of config.json and generation_config.json; the API process adds the tokenizer's
    sampling_defaults: dict[str, float | int] = {}  # fields of SamplingParams that the checkpoint gives a value
    kv_capacity_tokens: int
    device: str
    dtype: str
    summary: str  # the start-up block: model, memory plan, predicted and measured, seconds per phase
    config: dict[str, Any]  # the effective settings
    adapters: list[AdapterInfo] = []
    generates: bool = True  # False: prompts are pooled and nothing else
    pooling: PoolingSpec | None = None  # None: prompts cannot be pooled
    refuses_late: bool = False  # a latency model is there, and with it deadlines are checked at arrival

    def with_end(self, token_id: int | None) -> EngineInfo:
        """The same, with the tokenizer's eos among the tokens that end an answer: models are trained to write it."""
        if token_id is None or token_id >= self.vocab_size or token_id in self.eos_token_ids:
            return self
        return msgspec.structs.replace(self, eos_token_ids=[*self.eos_token_ids, token_id])


class Phase(msgspec.Struct, tag=True):
    """Start-up goes on: `fraction` of the named phase is done."""

    name: str
    fraction: float


class Ready(msgspec.Struct, tag=True):
    info: EngineInfo


class Failed(msgspec.Struct, tag=True):
    """The engine cannot start, or cannot go on. The process ends with `exit_code` after it."""

    error: ErrorInfo
    exit_code: int


class Outputs(msgspec.Struct, tag=True):
    """All outputs of one step."""

    outputs: list[TokenOutput]
    step_tokens: list[int]  # tokens computed by each step since the last message
    step_ratios: list[float] = []  # observed / predicted seconds of some of them, where there is a latency model


class Heartbeat(msgspec.Struct, tag=True):
    """Sent several times a second by a thread of its own, also while a step runs for long."""

    sent_s: float  # monotonic, the same clock in both processes
    loop_s: float  # when the engine's loop last ran: between steps, or idle
    busy: bool  # in a step since `loop_s`
    num_malformed: int  # messages dropped since the start
    stats: SchedulerStats


class CallResult(msgspec.Struct, tag=True):
    call_id: int
    value: Any = None
    error: ErrorInfo | None = None


class RemoteError(PowerbandError):
    """An error that the engine's process raised."""

    def __init__(self, info: ErrorInfo, exit_code: int = PowerbandError.exit_code) -> None:
        super().__init__(info.message, hint=info.hint, code=info.code, param=info.param)
        self.exit_code = exit_code
        self.http_status = info.http_status
        self.retry_after_s = info.retry_after_s


FromEngine = Phase | Ready | Failed | Outputs | Heartbeat | CallResult


class MessageCodec:
    """Encodes messages, and decodes those of one side. Not shared between threads."""

    def __init__(self, receives: Any) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(receives)
        self.num_malformed = 0

    def encode(self, message: ToEngine | FromEngine) -> bytes:
        return self._encoder.encode(message)

    def decode(self, data: bytes) -> Any | None:
        """The message, or None when the bytes are none (they are counted)."""
        try:
            return self._decoder.decode(data)
        except (msgspec.MsgspecError, PowerbandError, ValueError, TypeError, RecursionError):
            self.num_malformed += 1
            return None
