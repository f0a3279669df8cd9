"""Decides, step by step, which request computes how many tokens. Pure: no clock, no randomness, no I/O, no device.

There are no phases. A request has positions whose KV exists and positions whose KV is missing; prompts in chunks,
prefix hits, decoding, resuming after preemption and drafts are all the same subtraction.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import asdict
from operator import attrgetter

from powerband.core.admission import Admission, SchedulerLimits
from powerband.core.kv_cache import KVCacheManager
from powerband.core.policy import FirstComeFirstServed, SchedulingPolicy
from powerband.core.request import EngineRequest, Request, new_request, rotate_for
from powerband.core.results import new_prompt_rows, no_vector, take_tokens, token_output, wrong_count
from powerband.core.stats import Counters, SchedulerStats
from powerband.core.step import ErrorInfo, FinishReason, NewRequest, Step, StepResult, TokenOutput, Work
from powerband.errors import InvalidRequest, RequestTooLong
from powerband.spec.model.model_spec import RopeSpec

_by_order = attrgetter("order")

# Of prompts whose log-probabilities are asked for, in a step: each token is a row over the whole vocabulary, which
# takes much longer than its share of a prefill, and all others wait for the step.
MAX_PROMPT_LOGPROB_TOKENS = 256


class Scheduler:
    """Holds all live requests. `running` and `waiting` are sorted by the policy; the last is preempted first.

    `relay`: unconfirmed samples on top of which a request may be scheduled (Executor.relay). `num_stages`: pipeline
    stages; each step then takes its share of the decoding requests, so that the other stages have work too.
    `propose(request)` returns draft tokens to verify, or none. `rope`: the model's `length_rope`. `whole_prompts`: the
    model sees a prompt in both directions, so that it is computed in one step. `pools_every_position`: see new_request.
    """

    def __init__(
        self,
        kv: KVCacheManager,
        limits: SchedulerLimits,
        *,
        policy: SchedulingPolicy | None = None,
        relay: int = 0,
        num_stages: int = 1,
        propose: Callable[[Request], list[int]] | None = None,
        estimate_s: Callable[[int, int], float] | None = None,
        rope: RopeSpec | None = None,
        whole_prompts: bool = False,
        pools_every_position: bool = False,
    ) -> None:
        self.kv = kv
        self.limits = limits
        self.policy = policy or FirstComeFirstServed()
        self.relay = relay
        self.num_stages = num_stages
        self.propose = propose
        self.rope = rope
        self.whole_prompts = whole_prompts
        self.pools_every_position = pools_every_position or whole_prompts
        self.admission = Admission(limits, estimate_s)
        self.paused = False
        self.requests: dict[str, Request] = {}
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self._chunk = limits.long_prefill_token_threshold or limits.max_num_batched_tokens
        self._logprob_tokens_left = MAX_PROMPT_LOGPROB_TOKENS
        self._dropped: list[str] = []
        self._epoch = 0
        self._num_waiting_tokens = 0
        self.counters = Counters()

    # Requests in and out

    def add(self, source: EngineRequest, now: float) -> None:
        """Accept a request. Raises InvalidRequest, RequestTooLong or QueueFull (see Admission)."""
        if source.id in self.requests:
            raise InvalidRequest(f"Request id {source.id!r} is in use.", hint="Choose a new one.", param="request_id")
        r = new_request(
            source,
            max_length=min(self.limits.max_model_len, self.kv.max_tokens),
            epoch=self._next_epoch(),
            pools_every_position=self.pools_every_position,
        )
        self._check_length(r)
        rotate_for(r, self.rope)
        slots = max(self.limits.max_num_seqs - len(self.running), 0)
        self.admission.check_queue(len(r.tokens), len(self.waiting), self._num_waiting_tokens, slots, now)
        if r.deadline_s is not None and self.admission.estimate_s is not None:
            running = sum(q.num_missing for q in self.running)
            self.admission.check_deadline(r, self._num_waiting_tokens + running, now)
        self.requests[r.id] = r
        self.counters.num_requests += 1
        self.policy.arrived(r)
        self._enqueue(r, now)

    def abort(self, id: str, reason: FinishReason, now: float) -> TokenOutput | None:
        """End a request at any time, also with steps in flight; return its last output, or None if it is not live."""
        r = self.requests.get(id)
        if r is None:
            return None
        self._finish(r)
        return token_output(r, [], now, reason)

    def pause(self) -> None:
        """Schedule nothing more until `resume`. Requests may still come and go; steps in flight finish."""
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def reset_prefix_cache(self) -> None:
        """Forget all reusable content. Running requests keep what they have."""
        self.kv.reset(self.running)

    # A step

    def schedule(self, now: float) -> Step | None:
        """Return the next step, or None when nothing can be computed now."""
        if self.paused:
            return None
        works: list[Work] = []
        self.kv.begin_step(self.counters.num_steps + 1)
        self._logprob_tokens_left = MAX_PROMPT_LOGPROB_TOKENS
        if self.policy.dynamic:
            self._sort(self.running, now)
        budget, preempted = self._continue_running(works)
        if not preempted and budget > 0 and self.waiting and len(self.running) < self.limits.max_num_seqs:
            self._start_waiting(works, budget, now)
        if not works:
            return None
        self.counters.num_steps += 1
        step = Step(self.counters.num_steps, works, self._dropped)
        self._dropped = []
        return step

    def _continue_running(self, works: list[Work]) -> tuple[int, bool]:
        """Fill `works` from the running requests, in order; return the budget left and whether any was preempted."""
        budget = self.limits.max_num_batched_tokens
        dynamic = self.policy.dynamic
        if self.rope is not None:
            self._rotate_again()
        decodes_left = self._count_decodes()  # each gets one token of the budget before anyone gets a second
        decode_quota = self._decode_quota()
        preempted = False
        for r in self.running:  # a preemption removes the last one
            known = len(r.tokens) + r.num_pending
            if not self._can_run(r) or known >= r.max_length or known > r.max_rotated:
                continue
            n = known - r.num_computed
            drafts: list[int] = []
            if n > 1:
                n = min(n, self._chunk_of(r), budget - decodes_left)
                if n <= 0:
                    continue
            else:
                decodes_left -= 1
                if decode_quota <= 0:
                    continue
                decode_quota -= 1
                if self.propose is not None:
                    limit = min(r.max_length - known, r.max_rotated - known + 1, budget - decodes_left) - 1
                    drafts = self._drafts(r, limit)
                    if not self.kv.has_room(r, 1 + len(drafts)):  # a guess is not worth a preemption
                        drafts = []
                    n += len(drafts)
            blocks: list[int] = []
            if r.num_computed + n > r.capacity:
                grown, preempted_now = self._grow(r, n)
                preempted |= preempted_now
                if grown is None:
                    break
                blocks = grown
            works.append(self._work(r, n, drafts, blocks))
            budget -= n
            if dynamic:
                self.policy.charge(r, n)
            if budget <= 0:
                break
        return budget, preempted

    def _chunk_of(self, r: Request) -> int:
        """Tokens of its prompt that this step may still compute, at most."""
        return self._chunk if r.params.prompt_logprobs is None else min(self._chunk, self._logprob_tokens_left)

    def _rotate_again(self) -> None:
        """Preempt the requests that have grown beyond what their keys are rotated for: all keys are computed again."""
        for r in [r for r in self.running if len(r.tokens) > r.max_rotated and not r.num_pending]:
            self._preempt(r)

    def _decode_quota(self) -> int:
        """How many decoding requests this step may take: with pipeline stages, an equal share of them."""
        if self.num_stages == 1:
            return len(self.running)
        return -(-sum(r.num_missing == 1 for r in self.running) // self.num_stages)

    def _count_decodes(self) -> int:
        """Running requests that can be scheduled now and need exactly one token."""
        count = 0
        for r in self.running:
            known = len(r.tokens) + r.num_pending
            if self._can_run(r) and known < r.max_length and known <= r.max_rotated and known - r.num_computed == 1:
                count += 1
        return count

    def _can_run(self, r: Request) -> bool:
        """Whether the steps in flight leave a running request free to be scheduled."""
        return r.inflight <= (0 if r.waits_for_token else self.relay) and not r.drafting

    def _drafts(self, r: Request, limit: int) -> list[int]:
        if self.propose is None or r.num_pending or limit <= 0 or not r.num_output or r.waits_for_token:
            return []
        return self.propose(r)[:limit]

    def _grow(self, r: Request, n: int) -> tuple[list[int] | None, bool]:
        """Allocate for `n` positions, preempting from the end of the order; None if `r` itself had to go."""
        preempted = False
        while (blocks := self.kv.allocate(r, n)) is None:
            # The last in order: never in the step being built, because that is filled in the same order.
            victim = self.running[-1]
            self._preempt(victim)
            preempted = True
            if victim is r:
                return None, True
        return blocks, preempted

    def _work(self, r: Request, n: int, drafts: list[int], blocks: list[int]) -> Work:
        """Commit `r` to computing `n` positions, drafts included."""
        if r.params.prompt_logprobs is not None and n > 1:
            self._logprob_tokens_left -= n
        start = r.num_computed
        end = r.num_computed = start + n
        samples = end == len(r.tokens) + r.num_pending + len(drafts)
        if samples:
            r.num_pending += 1 + len(drafts)
            r.inflight += 1
            r.drafting = bool(drafts)
        if n > 1 or blocks:
            self.kv.publish(r)
        return Work(r.id, r.epoch, start, n, blocks, samples, drafts)

    def _start_waiting(self, works: list[Work], budget: int, now: float) -> None:
        """Move waiting requests to running, in order, while budget, seats and blocks last."""
        if self.policy.dynamic:
            self._sort(self.waiting, now)
        while self.waiting and budget > 0 and len(self.running) < self.limits.max_num_seqs:
            r = self.waiting[0]
            if self._chunk_of(r) <= 0 or (self.whole_prompts and len(r.tokens) > budget):
                return
            match = self.kv.match(r)
            # The running keep room to grow: starting one more only to preempt it gains nothing.
            if not self.kv.fits(r, match, self.running):
                return
            del self.waiting[0]
            self._num_waiting_tokens -= len(r.tokens)
            self.kv.attach(r, match)
            n = len(r.tokens) - r.num_computed
            if not self.whole_prompts:
                n = min(n, budget, self._chunk_of(r))
            self.kv.allocate_prompt(r, n)
            if r.scheduled_s is None:
                self._first_start(r, now)
            r.running = True
            insort(self.running, r, key=_by_order)
            work = self._work(r, n, [], list(r.blocks))
            work.new = NewRequest(list(r.tokens), r.num_prompt_tokens, r.params, r.rope_length, r.adapter, r.pooling)
            works.append(work)
            budget -= n
            if self.policy.dynamic:
                self.policy.charge(r, n)

    def _first_start(self, r: Request, now: float) -> None:
        r.scheduled_s = now
        r.num_cached = min(r.num_computed, r.num_prompt_tokens)
        self.counters.prompt_tokens += r.num_prompt_tokens
        if self.kv.prefix_caching and r.uses_prefix_cache:
            self.counters.prefix_queries += r.num_prompt_tokens
            self.counters.prefix_hits += r.num_cached
        self.admission.started(now)

    # Its result

    def update(self, step: Step, result: StepResult, now: float) -> list[TokenOutput]:
        """Process what `step` yielded; return the outputs of its requests.

        A result whose request is gone, or has another epoch by now, is dropped. That alone makes abort, finish and
        preemption with steps in flight correct.
        """
        outputs: list[TokenOutput] = []
        requests, tokens_of, logprobs_of = self.requests, result.tokens, result.logprobs
        counters = self.counters
        special = bool(result.failed or result.prompt_logprobs)
        for w in step.works:
            r = requests.get(w.id)
            if r is None or r.epoch != w.epoch:
                continue
            rows = None
            if special:
                if w.id in result.failed:
                    outputs.append(self._fail(r, w, step.index, result.failed[w.id], now))
                    continue
                rows = new_prompt_rows(r, w, result.prompt_logprobs.get(w.id))
            if not w.samples:
                if rows:
                    outputs.append(token_output(r, [], now, prompt_logprobs=rows))
                continue
            if r.pooling is not None:
                outputs.append(self._finish_pooled(r, w, step.index, result, now))
                continue
            got = tokens_of.get(w.id)
            if not got or len(got) > 1 + len(w.drafts):
                outputs.append(self._fail(r, w, step.index, wrong_count(w, got), now))
                continue
            forced, is_complete = result.forced.get(w.id, ()), w.id in result.complete
            got, finish, stop_token = take_tokens(r, w, got, forced, is_complete=is_complete)
            counters.generation_tokens += len(got)
            outputs.append(token_output(r, got, now, finish, stop_token, logprobs_of.get(w.id), rows))
            if finish is not None:
                self._finish(r)
        return outputs

    def _finish_pooled(self, r: Request, w: Work, index: int, result: StepResult, now: float) -> TokenOutput:
        """End a request whose prompt has been computed, with its vector."""
        vector = result.vectors.get(w.id)
        if vector is None:
            return self._fail(r, w, index, no_vector(), now)
        self._finish(r)
        return token_output(r, [], now, FinishReason.STOP, vector=vector)

    # Failure

    def fail(self, step: Step, error: ErrorInfo, now: float) -> list[TokenOutput]:
        """The whole step failed: end its requests with `error`, and compute again whatever may rest on it."""
        works = [w for w in step.works if (r := self.requests.get(w.id)) is not None and r.epoch == w.epoch]
        failed = [self.requests[w.id] for w in works]
        self.kv.reset(self.running)
        outputs = [token_output(r, [], now, FinishReason.ERROR, error=error) for r in failed]
        for r in failed:
            self._finish(r)
        for r in list(self.running):
            self._preempt(r)
        # The executor may not have got this far; a second mention does no harm.
        self._dropped = [id for id in step.dropped if id not in self.requests] + self._dropped
        return outputs

    def _fail(self, r: Request, w: Work, index: int, error: ErrorInfo, now: float) -> TokenOutput:
        """End one request, whose work in step `index` failed; requests that read what it wrote compute it again."""
        first = w.start // self.kv.block_size
        readers = self._readers(r, first)
        self.kv.forget_since(index)
        self.kv.invalidate(r, first)
        output = token_output(r, [], now, FinishReason.ERROR, error=error)
        self._finish(r)
        for q in readers:
            self.kv.invalidate(q, first)
            self._preempt(q)
        return output

    def _readers(self, r: Request, first: int) -> list[Request]:
        """Running requests that may share blocks of `r` from `first` on, or have read some before a window passed."""
        if len(r.block_keys) <= first:  # the block was never full
            return []
        key = r.block_keys[first]
        return [q for q in self.running if q is not r and len(q.block_keys) > first and q.block_keys[first] == key]

    # Bookkeeping

    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            num_waiting_tokens=self._num_waiting_tokens,
            paused=self.paused,
            cache=self.kv.usage(),
            num_refused=self.admission.num_refused,
            **asdict(self.counters),
        )

    def _check_length(self, r: Request) -> None:
        room = min(self.limits.max_model_len, self.kv.max_tokens)
        limit = room if r.pooling is not None else room - 1
        if len(r.tokens) <= min(limit, r.max_length - 1):
            return
        what = "context" if self.limits.max_model_len <= self.kv.max_tokens else "KV cache"
        raise RequestTooLong(
            f"The prompt has {len(r.tokens)} tokens; the {what} takes {limit}"
            + ("." if r.pooling is not None else " and one output token."),
            limit=limit,
            hint=f"Shorten the prompt to {limit} tokens.",
            param="prompt",
        )

    def _preempt(self, r: Request) -> None:
        """Take everything back from a running request; it waits, and will be computed again."""
        self._remove(self.running, r)
        r.running = False
        self.kv.release(r)
        r.num_computed = r.num_pending = r.inflight = 0
        r.drafting = False
        rotate_for(r, self.rope)
        r.epoch = self._next_epoch()
        r.num_preemptions += 1
        self.counters.num_preemptions += 1
        self._num_waiting_tokens += len(r.tokens)
        insort(self.waiting, r, key=_by_order)

    def _finish(self, r: Request) -> None:
        if r.running:
            self._remove(self.running, r)
            self.kv.release(r)
        else:
            self._remove(self.waiting, r)
            self._num_waiting_tokens -= len(r.tokens)
        del self.requests[r.id]
        self._dropped.append(r.id)
        self.policy.finished(r)

    def _enqueue(self, r: Request, now: float) -> None:
        r.order = self.policy.key(r, now)
        self._num_waiting_tokens += len(r.tokens)
        insort(self.waiting, r, key=_by_order)

    def _sort(self, requests: list[Request], now: float) -> None:
        key = self.policy.key
        for r in requests:
            r.order = key(r, now)
        requests.sort(key=_by_order)

    def _remove(self, requests: list[Request], r: Request) -> None:
        del requests[bisect_left(requests, r.order, key=_by_order)]

    def _next_epoch(self) -> int:
        self._epoch += 1
        return self._epoch
