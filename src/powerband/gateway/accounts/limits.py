"""Limits of keys: reserved before a request is dispatched and settled when it ends, so that concurrent requests cannot
exceed them.

A limit per minute applies to any 60 seconds, not only to calendar minutes: requests and tokens count at the moment when
they were admitted. Before dispatch a request reserves the maximum that it can use. It returns what it did not use: of
the prompt as soon as a replica has counted it, the rest when it ends.

    prompt   For a budget in USD: one token for each byte of the body, which is an upper bound (except for what a chat
             template or an image adds to a short body; a budget can be exceeded by that much). For tokens per minute:
             the tokens per byte of the key's earlier prompts, at least 0.25, or 0.5 before the first. A request that
             could exceed the limit alone reserves all of it. Since earlier prompts prove nothing about the next ones,
             the upper bounds of all running prompts that no replica has counted yet stay within the limit, too; a
             single one may exceed it.
    output   max_tokens times n. Without max_tokens: the smaller of the context length and a quarter of what is left,
             but at least the setting default_output_tokens; the replica gets this number as max_tokens.

Usage beyond the reservation counts as soon as it is seen. After a restart the minutes are empty, and the spend is read
from the database. Everything runs on the event loop, so that check and reservation are atomic.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from powerband.errors import PowerbandError
from powerband.gateway.accounts.keys import Key, KeyLimits
from powerband.gateway.request import GatewayRequest
from powerband.gateway.routes import ModelRoute
from powerband.spec.quantities import count_text
from powerband.web.errors import HttpError

logger = logging.getLogger(__name__)

WINDOW_S = 60
_SOON_S = 1.0  # Retry-After when the time is unknown
_NOTHING_USD = 1e-9  # sums of floats
_SHARE = 4  # a request without max_tokens reserves 1/4 of what is left, to leave some for others
_FIRST_DENSITY = 0.5  # tokens a byte: twice that of English; of Chinese it is a third
_MIN_DENSITY = 0.25  # that of English
_LEARNING = 5  # a lower density of a key's prompts counts with weight 1/5, a higher one fully


@dataclass(frozen=True, slots=True)
class TokenPrice:
    """USD of a token. Cached ones cost what other prompt tokens do."""

    input: float = 0.0
    output: float = 0.0

    def of(self, prompt_tokens: int, output_tokens: int) -> float:
        return prompt_tokens * self.input + output_tokens * self.output


FREE = TokenPrice()


class LimitReached(PowerbandError):
    """A limit of the key is reached (HTTP 429). retry_after_s: when the same request will fit; inf: never."""

    http_status = 429

    def __init__(self, code: str, message: str, *, retry_after_s: float, hint: str = "") -> None:
        super().__init__(message, code=code, hint=hint)
        self.retry_after_s = retry_after_s


class SlidingWindow:
    """A sum over the last 60 seconds, in cells of one second."""

    def __init__(self) -> None:
        self._cells: deque[list[int]] = deque()  # [second, amount]
        self._sum = 0

    def total(self, now_s: float) -> int:
        oldest = math.floor(now_s) - WINDOW_S
        while self._cells and self._cells[0][0] < oldest:
            self._sum -= self._cells.popleft()[1]
        return self._sum

    def add(self, amount: int, now_s: float) -> list[int]:
        """Add an amount now. Returns its cell, for `correct`."""
        self.total(now_s)
        second = math.floor(now_s)
        if not self._cells or self._cells[-1][0] < second:
            self._cells.append([second, 0])
        self._cells[-1][1] += amount
        self._sum += amount
        return self._cells[-1]

    def correct(self, cell: list[int], change: int, now_s: float) -> None:
        self.total(now_s)
        if self._cells and self._cells[0][0] <= cell[0]:  # otherwise the cell has expired
            cell[1] += change
            self._sum += change

    def wait_s(self, amount: int, limit: int, now_s: float) -> float:
        """Seconds until `amount` certainly fits below `limit`; running requests that end may make it fit sooner."""
        missing = self.total(now_s) + amount - limit
        for second, held in self._cells:
            if missing <= 0:
                break
            missing -= held
            if missing <= 0:
                return second + WINDOW_S + 1 - now_s
        return 0.0

    def empty_s(self, now_s: float) -> float:
        """Seconds until nothing is counted any more."""
        self.total(now_s)
        return self._cells[-1][0] + WINDOW_S + 1 - now_s if self._sum and self._cells else 0.0


class _Account:
    """What one key has used and reserved."""

    def __init__(self) -> None:
        self.requests = SlidingWindow()
        self.tokens = SlidingWindow()
        self.running = 0
        self.density = _FIRST_DENSITY  # tokens of its prompts for each that they could have had
        self.uncounted = 0  # upper bound of the tokens of running prompts that no replica has counted
        self.reserved_usd = 0.0
        self.total_usd = 0.0
        self.month_usd = 0.0
        self.month = ""

    def learn(self, density: float) -> None:
        """Up at once, down in steps."""
        density = min(max(density, _MIN_DENSITY), 1.0)
        step = 1 if density > self.density else _LEARNING
        self.density += (density - self.density) / step

    def spent(self, limits: KeyLimits, month: str) -> float:
        if self.month < month:  # a clock that is set back does not give back what was spent
            self.month, self.month_usd = month, 0.0
        return self.month_usd if limits.usd_period == "month" else self.total_usd


class Reservation:
    """What a request has reserved. `settle` or `cancel` ends it: the first call counts, further ones do nothing.

    output: reserved tokens of all choices. cap: max_tokens of each choice for the replica; None: as the client sent it.
    """

    __slots__ = (
        "_account",
        "_cells",
        "_learns",
        "_limits",
        "_max_prompt",
        "_open",
        "_price",
        "_prompt",
        "_uncounted",
        "_usd",
        "cap",
        "output",
    )

    def __init__(
        self,
        limits: Limits,
        account: _Account | None,
        prompt: int = 0,
        output: int = 0,
        *,
        max_prompt: int = 0,
        price: TokenPrice = FREE,
        cap: int | None = None,
        learns: bool = False,
    ) -> None:
        """prompt, output: tokens to reserve. max_prompt: the upper bound of the prompt's tokens, for the budget.

        learns: whether the prompt's final count updates the key's tokens per byte.
        """
        self._learns = learns
        self._limits = limits
        self._account = account
        self._prompt = prompt
        self._max_prompt = max_prompt
        self._price = price
        self._usd = price.of(max_prompt, output)
        self._open = account is not None
        self._uncounted = max_prompt if learns else 0
        self.output = output
        self.cap = cap
        if account is not None:
            account.uncounted += self._uncounted
            now_s = limits.monotonic()
            self._cells = account.requests.add(1, now_s), account.tokens.add(prompt + output, now_s)
            account.running += 1
            account.reserved_usd += self._usd

    def prompt_counted(self, tokens: int) -> None:
        """A replica has counted the prompt: return what was reserved beyond that."""
        if self._open and self._account is not None:
            self._end_uncounted(self._account)
            self._take(tokens - self._prompt)
            self._prompt = tokens
            change_usd = self._price.of(tokens, self.output) - self._usd
            self._account.reserved_usd += change_usd
            self._usd += change_usd

    def _end_uncounted(self, account: _Account) -> None:
        account.uncounted -= self._uncounted
        self._uncounted = 0

    def add_output_tokens(self, output_tokens: int) -> None:
        """Output tokens so far: those beyond the reservation count at once."""
        surplus = output_tokens - self.output
        if surplus > 0 and self._open:
            self._take(surplus)
            self.output = output_tokens

    def settle(self, prompt_tokens: int, output_tokens: int, cost_usd: float, *, is_estimate: bool = False) -> None:
        """The request reached a replica: count what it used, cached tokens as other prompt tokens.

        is_estimate: do not update the key's tokens per byte.
        """
        if self._account is not None and self._learns and prompt_tokens and not is_estimate:
            self._account.learn(prompt_tokens / self._max_prompt)
        self._close(max(0, prompt_tokens) + max(0, output_tokens), max(0.0, cost_usd), counts=True)

    def _take(self, tokens: int) -> None:
        if self._account is not None:
            self._account.tokens.correct(self._cells[1], tokens, self._limits.monotonic())

    def cancel(self) -> None:
        """The request reached no replica: it does not count."""
        self._close(0, 0.0, counts=False)

    def _close(self, tokens: int, usd: float, *, counts: bool) -> None:
        account = self._account
        if not self._open or account is None:
            return
        self._open = False
        self._end_uncounted(account)
        now_s = self._limits.monotonic()
        if not counts:
            account.requests.correct(self._cells[0], -1, now_s)
        account.tokens.correct(self._cells[1], tokens - self._prompt - self.output, now_s)
        account.running -= 1
        account.reserved_usd = account.reserved_usd - self._usd if account.running else 0.0
        self._limits.spend(account, usd)

    def __del__(self) -> None:
        if self._open:  # a defect; without this the key would lose the reservation permanently
            logger.error("A reservation was neither settled nor cancelled.")
            self._close(self._prompt + self.output, self._usd, counts=True)


def room_for_output(context: int, max_prompt_tokens: int) -> int:
    """Tokens that a context has left beside a prompt, so that engines do not reject the request.

    The prompt's exact size is not known yet; it is taken as at most one token per three bytes.
    """
    return context - min(max_prompt_tokens, max_prompt_tokens // 3 + 64)


class Limits:
    """What all keys have used. spent: key id → (USD in total, USD this month), from the database."""

    def __init__(
        self,
        spent: Mapping[str, tuple[float, float]],
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.monotonic = monotonic
        self._wall = wall
        self._accounts: dict[str, _Account] = {}
        for id, (total_usd, month_usd) in spent.items():
            account = self._account(id)
            account.total_usd, account.month_usd, account.month = total_usd, month_usd, month_of(wall())

    def reserve(
        self, key: Key | None, request: GatewayRequest, price: TokenPrice = FREE, *, context: int | None = None
    ) -> Reservation:
        """Reserve the maximum that the request can use. Raises LimitReached, or HttpError if it can never fit.

        context: maximum tokens of prompt and output at a replica; None: unknown.
        """
        if key is None:
            return Reservation(self, None)
        limits, account = key.limits, self._account(key.id)
        if limits.models and request.model not in limits.models:
            raise HttpError(403, "model_not_allowed", "This API key may not use this model.", param="model")
        max_prompt = request.prompt_tokens if request.max_prompt_tokens is None else request.max_prompt_tokens
        is_exact = max_prompt == request.prompt_tokens
        likely_prompt = max_prompt if is_exact else math.ceil(max_prompt * account.density)
        cap = self._cap(limits, account, request, (likely_prompt, max_prompt), price, context)
        requested = request.output_tokens if request.max_output_tokens is None else request.max_output_tokens
        output = requested if cap is None else cap * request.num_sequences
        max_usd = price.of(max_prompt, output)
        self._check_possible(limits, request.prompt_tokens + output, max_usd)
        prompt = likely_prompt
        if limits.tokens_per_min is not None:
            prompt = min(prompt, limits.tokens_per_min - output)
        self._check_rates(limits, account, prompt + output)
        if not is_exact:
            self._check_uncounted(limits, account, max_prompt)
        self._check_spend(limits, account, max_usd)
        return Reservation(
            self, account, prompt, output, max_prompt=max_prompt, price=price, cap=cap, learns=not is_exact
        )

    def _cap(
        self,
        limits: KeyLimits,
        account: _Account,
        request: GatewayRequest,
        prompt: tuple[int, int],
        price: TokenPrice,
        context: int | None,
    ) -> int | None:
        """Output tokens of each choice of a request without max_tokens, so that it cannot exceed its reservation.

        prompt: its likely and its maximum tokens.
        """
        if not request.is_open_ended or not limits.counts_tokens:
            return None
        expected = request.max_output_tokens or request.output_tokens
        output = float(expected if context is None else context * request.num_sequences)
        for allowed, left in self._room(limits, account, request, prompt, price):
            output = min(output, max(min(expected, allowed), left / _SHARE))
        each = max(1, math.floor(output / request.num_sequences))
        return each if context is None else max(1, min(each, room_for_output(context, prompt[1])))

    def _room(
        self, limits: KeyLimits, account: _Account, request: GatewayRequest, prompt: tuple[int, int], price: TokenPrice
    ) -> Iterator[tuple[float, float]]:
        """For each limit: output tokens that it allows beside the prompt if nothing else were used, and now."""
        if limits.tokens_per_min is not None:
            left = limits.tokens_per_min - account.tokens.total(self.monotonic()) - prompt[0]
            yield limits.tokens_per_min - request.prompt_tokens, left
        if limits.usd is not None and price.output:
            allowed_usd = limits.usd - prompt[1] * price.input
            used_usd = account.spent(limits, month_of(self._wall())) + account.reserved_usd
            yield allowed_usd / price.output, (allowed_usd - used_usd) / price.output

    def headers(self, key: Key) -> dict[str, str]:
        """x-ratelimit-… as OpenAI's: limit, remaining, and the time until all of it is available again."""
        account, now_s = self._account(key.id), self.monotonic()
        found = {}
        for what, limit, minute in (
            ("requests", key.limits.requests_per_min, account.requests),
            ("tokens", key.limits.tokens_per_min, account.tokens),
        ):
            if limit is not None:
                found[f"x-ratelimit-limit-{what}"] = str(limit)
                found[f"x-ratelimit-remaining-{what}"] = str(max(0, limit - minute.total(now_s)))
                found[f"x-ratelimit-reset-{what}"] = _as_time(minute.empty_s(now_s))
        return found

    def used(self, key: Key) -> dict[str, float]:
        """What counts against its limits now."""
        account, now_s = self._account(key.id), self.monotonic()
        return {
            "requests_last_min": account.requests.total(now_s),
            "tokens_last_min": account.tokens.total(now_s),
            "running": account.running,
            "usd": round(account.spent(key.limits, month_of(self._wall())), 9),
        }

    def spend(self, account: _Account, usd: float) -> None:
        if usd:
            account.spent(_MONTHLY, month_of(self._wall()))
            account.month_usd += usd
            account.total_usd += usd

    def _check_possible(self, limits: KeyLimits, tokens: int, max_usd: float) -> None:
        if limits.tokens_per_min is not None and tokens > limits.tokens_per_min:
            raise HttpError(
                400,
                "tokens_limit",
                f"The request may use {tokens} tokens, but the API key only {limits.tokens_per_min} per minute.",
                hint="Lower max_tokens, or shorten the prompt.",
                param="max_tokens",
            )
        if limits.usd is not None and max_usd > limits.usd + _NOTHING_USD:
            raise HttpError(
                400,
                "spend_limit",
                f"The request may cost {max_usd:.4f} USD, but the API key may spend only {limits.usd:g}.",
                hint="Lower max_tokens, or shorten the prompt.",
                param="max_tokens",
            )

    def _check_rates(self, limits: KeyLimits, account: _Account, tokens: int) -> None:
        now_s = self.monotonic()
        if limits.max_concurrency is not None and account.running >= limits.max_concurrency:
            message = f"The API key has {account.running} running requests, its maximum."
            raise LimitReached("concurrency_limit", message, retry_after_s=_SOON_S, hint="Wait until one ends.")
        for code, what, limit, minute, amount in (
            ("requests_limit", "request", limits.requests_per_min, account.requests, 1),
            ("tokens_limit", "token", limits.tokens_per_min, account.tokens, tokens),
        ):
            if limit is not None and minute.total(now_s) + amount > limit:
                wait_s = minute.wait_s(amount, limit, now_s)
                used = minute.total(now_s)
                message = (
                    f"The API key may use {count_text(limit, what)} per minute; {used} are used, {amount} requested."
                )
                raise LimitReached(code, message, retry_after_s=wait_s, hint=f"Try again in {math.ceil(wait_s)} s.")

    def _check_uncounted(self, limits: KeyLimits, account: _Account, max_prompt: int) -> None:
        limit, used = limits.tokens_per_min, account.uncounted
        if limit is not None and used and used + max_prompt > limit:
            message = (
                f"The API key may use {limit} tokens per minute; running prompts that are not counted yet may have up"
                f" to {used}, this one up to {max_prompt}."
            )
            hint = "Wait until they are counted: those of streams are with the first token."
            raise LimitReached("tokens_limit", message, retry_after_s=_SOON_S, hint=hint)

    def _check_spend(self, limits: KeyLimits, account: _Account, max_usd: float) -> None:
        if limits.usd is None:
            return
        now = self._wall()
        spent = account.spent(limits, month_of(now))
        period = "this month" if limits.usd_period == "month" else "in total"
        message = f"The API key may spend {limits.usd:g} USD {period}; it has spent {spent:.4f}"
        if spent + max_usd > limits.usd + _NOTHING_USD or spent >= limits.usd:
            wait_s = _seconds_to_next_month(now) if limits.usd_period == "month" else math.inf
            hint = "It can spend again next month." if limits.usd_period == "month" else "An admin can raise the limit."
            raise LimitReached("spend_limit", f"{message}.", retry_after_s=wait_s, hint=hint)
        if spent + account.reserved_usd + max_usd > limits.usd + _NOTHING_USD:
            hint = "Wait until running requests end: they return what they do not use."
            raise LimitReached(
                "spend_limit",
                f"{message}, and running requests have reserved the rest.",
                retry_after_s=_SOON_S,
                hint=hint,
            )

    def _account(self, id: str) -> _Account:
        found = self._accounts.get(id)
        if found is None:
            found = self._accounts[id] = _Account()
        return found


_MONTHLY = KeyLimits(usd_period="month")


def price_from(route: ModelRoute) -> TokenPrice:
    return TokenPrice(route.usd_per_million_input / 1e6, route.usd_per_million_output / 1e6)


def month_of(at: float) -> str:
    """'2026-11', in UTC."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m")


def _seconds_to_next_month(now: float) -> float:
    today = datetime.fromtimestamp(now, UTC)
    first = today.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return ((first + timedelta(days=32)).replace(day=1) - today).total_seconds()


def _as_time(seconds: float) -> str:
    """'340ms', '7s' or '1m1s', rounded up."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
