"""From what a step yielded to the output of one request. Nothing here decides what runs."""

from __future__ import annotations

from collections.abc import Sequence

from powerband.core.request import Request
from powerband.core.step import ErrorInfo, FinishReason, TokenLogprobs, TokenOutput, Work


def take_tokens(
    r: Request, w: Work, got: list[int], forced: Sequence[int] = (), *, is_complete: bool = False
) -> tuple[list[int], FinishReason | None, int | None]:
    """Confirm the tokens that `w` yielded; return those that count, why `r` ends if it does, and its stop token.

    forced: further output, whose positions are still missing, as a prompt's are. is_complete: nothing can follow. Of
    accepted drafts and of forced tokens, whatever follows a stop is dropped. Stops before `min_tokens` are ordinary
    tokens.
    """
    r.inflight -= 1
    r.num_pending -= 1 + len(w.drafts)
    r.num_computed -= 1 + len(w.drafts) - len(got)  # positions of rejected drafts
    r.drafting = False
    tokens = r.tokens
    if forced:
        got = [*got, *forced]
    for kept, token in enumerate(got, 1):
        tokens.append(token)
        if token in r.stop_ids and r.num_output >= r.params.min_tokens:
            return got[:kept], FinishReason.STOP, token
        if len(tokens) >= r.max_length and not (is_complete and kept == len(got)):
            return got[:kept], FinishReason.LENGTH, None
    return got, FinishReason.STOP if is_complete else None, None


def token_output(
    r: Request,
    token_ids: list[int],
    now: float,
    finish: FinishReason | None = None,
    stop_token: int | None = None,
    logprobs: list[TokenLogprobs] | None = None,
    prompt_logprobs: list[TokenLogprobs] | None = None,
    error: ErrorInfo | None = None,
    vector: bytes | None = None,
) -> TokenOutput:
    """The output with `token_ids` of `r`. Log-probabilities of tokens that do not count are left out."""
    if logprobs is not None and len(logprobs) > len(token_ids):
        logprobs = logprobs[: len(token_ids)]
    return TokenOutput(
        r.id,
        token_ids,
        now,
        finish,
        stop_token,
        logprobs,
        prompt_logprobs,
        error,
        r.num_cached,
        r.num_preemptions,
        r.scheduled_s or 0.0,
        vector,
    )


def new_prompt_rows(r: Request, w: Work, rows: list[TokenLogprobs] | None) -> list[TokenLogprobs] | None:
    """Rows that were not reported before: a preempted prompt is computed again, but reported once."""
    if not rows:
        return None
    new = rows[max(r.num_prompt_rows - w.start, 0) :]
    r.num_prompt_rows = max(r.num_prompt_rows, w.start + len(rows))
    return new or None


def no_vector() -> ErrorInfo:
    """The executor broke its contract, or pools nothing; only this request suffers."""
    return ErrorInfo(
        "internal_error", "The executor returned no vector for a prompt that is pooled.", "Please report this."
    )


def wrong_count(w: Work, got: list[int] | None) -> ErrorInfo:
    """The executor broke its contract; only this request suffers."""
    return ErrorInfo(
        "internal_error",
        f"The executor returned {len(got or [])} tokens where 1 to {1 + len(w.drafts)} were due.",
        "Please report this.",
    )
