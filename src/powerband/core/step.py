"""The contract between the scheduler, which decides a step, and an executor, which carries it out.

Everything here is a plain value of lists, numbers and strings: it crosses a process boundary as a
message, and a simulator reads it as easily as a GPU runner does.

    request's positions   0 ............ start ......... start+num_tokens ......... end
                          |-- KV exists --|-- this step's work --|
    blocks (by index)     [ 0 ][ 1 ][ 2 ][ 3 ]...      position p lives in block_table[p // block_size]

Of models with sliding windows, a block is several pages in a row, one for each group of layers (spec.kv_layout), and a
layer finds position p in the page of its group. What lies before a layer's window must not be read: it may have another
owner by now.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from powerband.core.params import PoolingParams, SamplingParams


class FinishReason(str, Enum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(slots=True)
class NewRequest:
    """Full state, sent the first time an executor sees (id, epoch): new, or resumed after preemption."""

    token_ids: list[int]  # prompt and every confirmed output token
    num_prompt_tokens: int
    params: SamplingParams
    rope_length: int = 0  # its keys are rotated by at least this length (spec.rope.rope_length)
    adapter: str = ""  # digest of its adapter; "": none
    pooling: PoolingParams | None = None  # its last work yields a vector, and no token


@dataclass(slots=True)
class Work:
    """One request's part of a step: compute KV for positions [start, start + num_tokens).

    Input token of position p is known to the executor: from `NewRequest.token_ids`, or because the executor
    sampled it itself (it remembers what it sampled for a request), or it is one of `drafts` (the last
    len(drafts) positions). If `samples`, the last position (with drafts: the last 1 + len(drafts)) yields tokens, or
    the prompt's vector if that is what its request asks for.
    """

    id: str
    epoch: int
    start: int
    num_tokens: int
    # Appended to the request's block table; with `new`, the whole table. It may reach further than this step computes,
    # and its first blocks may be another request's: of an earlier step, or of this one (see Executor). -1: no page,
    # because a window has passed.
    new_blocks: list[int]
    samples: bool
    drafts: list[int] = field(default_factory=list)
    new: NewRequest | None = None


@dataclass(slots=True)
class Step:
    """One forward pass over `works`. Executors run steps in the order of `index`."""

    index: int
    works: list[Work]
    dropped: list[str] = field(default_factory=list)  # ids the executor may forget, before running the works

    @property
    def num_tokens(self) -> int:
        return sum(w.num_tokens for w in self.works)


@dataclass(slots=True)
class TokenLogprobs:
    """Log-probabilities at one position: `token_ids[0]` is the actual token, the rest the most likely ones in order."""

    token_ids: list[int]
    logprobs: list[float]
    rank: int  # of the actual token, 1 = most likely


@dataclass(slots=True)
class ErrorInfo:
    """A PowerbandError as a value."""

    code: str
    message: str
    hint: str = ""
    http_status: int = 500
    retry_after_s: float | None = None
    param: str | None = None


@dataclass(slots=True)
class StepResult:
    """What a step yielded, by request id. A request in `failed` yields nothing else and is finished with that error."""

    tokens: dict[str, list[int]]
    logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)  # one per token in `tokens[id]`
    # Rows of positions start+1 .. start+num_tokens that lie in the prompt (position 0 has none).
    prompt_logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)
    failed: dict[str, ErrorInfo] = field(default_factory=dict)
    vectors: dict[str, bytes] = field(default_factory=dict)  # of pooled prompts: float32 in native byte order
    # What a grammar leaves no choice about after `tokens[id]`: output, too, whose positions are not computed yet.
    forced: dict[str, list[int]] = field(default_factory=dict)
    complete: set[str] = field(default_factory=set)  # their grammars allow nothing after `tokens` and `forced`


@dataclass(slots=True)
class TokenOutput:
    """The output of one request after one step."""

    id: str
    token_ids: list[int]
    time_s: float  # engine's monotonic clock
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the stop or EOS token that ended it (it is the last of token_ids)
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None  # new rows, in order of position
    error: ErrorInfo | None = None
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache when first scheduled
    num_preemptions: int = 0
    scheduled_s: float = 0.0  # when first scheduled (queue time = scheduled_s - arrival_s)
    vector: bytes | None = None  # of a pooled prompt: float32 in native byte order


@dataclass(slots=True)
class DeviceReport:
    """What an executor found and did at start-up."""

    device: str  # "cpu" | "cuda:0" | "simulated"
    device_name: str
    weights_bytes: int
    seconds: dict[str, float] = field(default_factory=dict)  # phase → duration


class StepHandle(Protocol):
    """A submitted step."""

    def result(self) -> StepResult:
        """Wait for the step and return what it yielded. Called once, in submission order."""
        ...


class Executor(Protocol):
    """Carries out steps on some device. `submit` never blocks on the device.

    Steps run in order. Within a step, all works write their keys and values of a layer before any work attends: a work
    may read what another work of the same step computes. `submit` and `result` may raise; the step's requests then end
    with that error, `check` decides whether the engine goes on, and nothing that the step wrote is used again.

    `depth`: steps that may be in flight; `relay`: unconfirmed samples on top of which a request may be scheduled
    (the executor then reads the input token from where it sampled it).
    """

    depth: int
    relay: int

    def start(self) -> DeviceReport: ...
    def init_kv_cache(self, num_blocks: int) -> None: ...
    def submit(self, step: Step) -> StepHandle: ...
    def check(self) -> None:
        """Raise PowerbandError when the device can no longer work."""
        ...
