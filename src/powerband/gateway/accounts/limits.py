"""What keys may use: counted before a request is sent on, corrected when it is over, so that no crowd slips past.

A limit per minute holds for every 60 seconds that one can choose, not only for calendar minutes: requests and tokens
count at the moment at which they were let in. Before dispatch a request takes the most that it can use, and gives back
what it did not use: of the prompt as soon as a replica has counted it, the rest when it is over.

    prompt   of a budget in USD: a token for each byte of the body, which is a bound (but for what a chat template or a
             picture adds to a short body: by so much a budget can be exceeded). Of tokens a minute: as many as the
             key's prompts before had for each byte, and half as many before the first; one that alone may exceed the
             limit takes all of it.
    output   all that it may make: max_tokens times n. Where it names no limit, the context's length or a quarter of
             what is left, whichever is less, but not less than the setting default_output_tokens; and the replica is
             sent that as max_tokens.

More than was taken, if it ever comes, counts as soon as it is seen, and later requests wait for it. A restart begins
with empty minutes, and with what was spent. Everything runs on the event loop: check and taking are one step.
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
from powerband.web.errors import HttpError

logger = logging.getLogger(__name__)

WINDOW_S = 60
_SOON_S = 1.0  # for what ends at a time that nobody knows
_NOTHING_USD = 1e-9  # sums of floats
_SHARE = 4  # a request that names no limit takes this part of what is left, so that others find some, too
_FIRST_DENSITY = 0.5  # tokens a byte: twice that of English; of Chinese it is a third
_LEARNING = 5  # how slowly a key's prompts are believed to be less dense than they were


@dataclass(frozen=True, slots=True)
class TokenPrice:
    """USD of a token. Cached ones cost what other prompt tokens do."""

    input: float = 0.0
    output: float = 0.0

    def of(self, prompt_tokens: int, output_tokens: int) -> float:
        return prompt_tokens * self.input + output_tokens * self.output


FREE = TokenPrice()


class LimitReached(PowerbandError):
    """A key has used up what it may use (HTTP 429). retry_after_s: when the same request is sure to fit; inf: never."""

    http_status = 429

    def __init__(self, code: str, message: str, *, retry_after_s: float, hint: str = "") -> None:
        super().__init__(message, code=code, hint=hint)
        self.retry_after_s = retry_after_s


class SlidingWindow:
    """A sum over the last 60 seconds, in cells of one second; a cell leaves when all of it is older than that."""

    def __init__(self) -> None:
        self._cells: deque[list[int]] = deque()  # [second, amount]
        self._sum = 0

    def total(self, now_s: float) -> int:
        oldest = math.floor(now_s) - WINDOW_S
        while self._cells and self._cells[0][0] < oldest:
            self._sum -= self._cells.popleft()[1]
        return self._sum

    def add(self, amount: int, now_s: float) -> list[int]:
        """The cell that it went to, for `correct`."""
        self.total(now_s)
        second = math.floor(now_s)
        if not self._cells or self._cells[-1][0] < second:
            self._cells.append([second, 0])
        self._cells[-1][1] += amount
        self._sum += amount
        return self._cells[-1]

    def correct(self, cell: list[int], change: int, now_s: float) -> None:
        self.total(now_s)
        if self._cells and self._cells[0][0] <= cell[0]:  # otherwise it has left, and with it all that it held
            cell[1] += change
            self._sum += change

    def wait_s(self, amount: int, limit: int, now_s: float) -> float:
        """Seconds until `amount` is sure to fit below `limit`; what runs now may make it sooner."""
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
    """What one key has used and taken."""

    def __init__(self) -> None:
        self.requests = SlidingWindow()
        self.tokens = SlidingWindow()
        self.running = 0
        self.density = _FIRST_DENSITY  # tokens of its prompts for each that they could have had
        self.reserved_usd = 0.0
        self.total_usd = 0.0
        self.month_usd = 0.0
        self.month = ""

    def learn(self, density: float) -> None:
        """Up at once, down in steps."""
        step = 1 if density > self.density else _LEARNING
        self.density += (density - self.density) / step

    def spent(self, limits: KeyLimits, month: str) -> float:
        if self.month < month:  # a clock that is set back does not give back what was spent
            self.month, self.month_usd = month, 0.0
        return self.month_usd if limits.usd_period == "month" else self.total_usd


class Reservation:
    """What a request has taken. `settle` or `cancel` ends it: the first call counts, further ones do nothing.

    output: tokens of all answers that were taken. cap: on each answer, sent to the replica; None: none.
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
        """prompt, output: tokens to take. max_prompt: tokens that the prompt can have, which are taken of a budget.

        learns: what the prompt has in the end says how dense the key's prompts are.
        """
        self._learns = learns
        self._limits = limits
        self._account = account
        self._prompt = prompt
        self._max_prompt = max_prompt
        self._price = price
        self._usd = price.of(max_prompt, output)
        self._open = account is not None
        self.output = output
        self.cap = cap
        if account is not None:
            now_s = limits.monotonic()
            self._cells = account.requests.add(1, now_s), account.tokens.add(prompt + output, now_s)
            account.running += 1
            account.reserved_usd += self._usd

    def prompt_counted(self, tokens: int) -> None:
        """By a replica, before the end: what was taken beyond that is free again."""
        if self._open and self._account is not None:
            self._take(tokens - self._prompt)
            self._prompt = tokens
            change_usd = self._price.of(tokens, self.output) - self._usd
            self._account.reserved_usd += change_usd
            self._usd += change_usd

    def add_output_tokens(self, output_tokens: int) -> None:
        """So many so far: what is more than was taken counts at once."""
        surplus = output_tokens - self.output
        if surplus > 0 and self._open:
            self._take(surplus)
            self.output = output_tokens

    def settle(self, prompt_tokens: int, output_tokens: int, cost_usd: float, *, is_estimate: bool = False) -> None:
        """A replica had the request: count what it used, cached tokens like others.

        is_estimate: nothing is learnt from it.
        """
        if self._account is not None and self._learns and prompt_tokens and not is_estimate:
            self._account.learn(prompt_tokens / self._max_prompt)
        self._close(max(0, prompt_tokens) + max(0, output_tokens), max(0.0, cost_usd), counts=True)

    def _take(self, tokens: int) -> None:
        if self._account is not None:
            self._account.tokens.correct(self._cells[1], tokens, self._limits.monotonic())

    def cancel(self) -> None:
        """No replica had the request: it counts for nothing."""
        self._close(0, 0.0, counts=False)

    def _close(self, tokens: int, usd: float, *, counts: bool) -> None:
        account = self._account
        if not self._open or account is None:
            return
        self._open = False
        now_s = self._limits.monotonic()
        if not counts:
            account.requests.correct(self._cells[0], -1, now_s)
        account.tokens.correct(self._cells[1], tokens - self._prompt - self.output, now_s)
        account.running -= 1
        account.reserved_usd = account.reserved_usd - self._usd if account.running else 0.0
        self._limits.spend(account, usd)

    def __del__(self) -> None:
        if self._open:  # a defect; without this a key would lose a place for good
            logger.error("A reservation was neither settled nor cancelled.")
            self._close(self._prompt + self.output, self._usd, counts=True)


def room_for_output(context: int, max_prompt_tokens: int) -> int:
    """Tokens that a context has beside a prompt. Engines refuse what cannot fit: the prompt's size is not known yet,
    but three bytes a token are few.
    """
    return context - min(max_prompt_tokens, max_prompt_tokens // 3 + 64)


class Limits:
    """Accounts of all keys that were used. spent: key id → (USD in all, USD in this month), from the books."""

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
        """Take what the request can use at most. Raises LimitReached, or HttpError for what can never be.

        context: tokens of prompt and output that a replica takes; None: not known.
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
        most = request.output_tokens if request.max_output_tokens is None else request.max_output_tokens
        output = most if cap is None else cap * request.answers
        most_usd = price.of(max_prompt, output)
        self._check_possible(limits, request.prompt_tokens + output, most_usd)
        prompt = likely_prompt
        if limits.tokens_per_min is not None:
            prompt = min(prompt, limits.tokens_per_min - output)
        self._check_rates(limits, account, prompt + output)
        self._check_spend(limits, account, most_usd)
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
        """Output tokens of each answer of a request that names no limit, so that it cannot use more than it took.

        prompt: tokens that it is likely to have, and can have.
        """
        if not request.is_open_ended or not limits.counts_tokens:
            return None
        counted_on = request.max_output_tokens or request.output_tokens
        most = float(counted_on if context is None else context * request.answers)
        for allowed, left in self._room(limits, account, request, prompt, price):
            most = min(most, max(min(counted_on, allowed), left / _SHARE))
        each = max(1, math.floor(most / request.answers))
        return each if context is None else max(1, min(each, room_for_output(context, prompt[1])))

    def _room(
        self, limits: KeyLimits, account: _Account, request: GatewayRequest, prompt: tuple[int, int], price: TokenPrice
    ) -> Iterator[tuple[float, float]]:
        """Output tokens that each limit allows, beside the prompt, if nothing else were used; and now."""
        if limits.tokens_per_min is not None:
            left = limits.tokens_per_min - account.tokens.total(self.monotonic()) - prompt[0]
            yield limits.tokens_per_min - request.prompt_tokens, left
        if limits.usd is not None and price.output:
            allowed_usd = limits.usd - prompt[1] * price.input
            used_usd = account.spent(limits, month_of(self._wall())) + account.reserved_usd
            yield allowed_usd / price.output, (allowed_usd - used_usd) / price.output

    def headers(self, key: Key) -> dict[str, str]:
        """x-ratelimit-… as OpenAI's: what the key may use, what is left of it, and when all of it is there again."""
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

    def _check_possible(self, limits: KeyLimits, tokens: int, most_usd: float) -> None:
        if limits.tokens_per_min is not None and tokens > limits.tokens_per_min:
            raise HttpError(
                400,
                "tokens_limit",
                f"The request may use {tokens} tokens, the API key {limits.tokens_per_min} a minute: it can never fit.",
                hint="Ask for fewer with max_tokens, or shorten the prompt.",
                param="max_tokens",
            )
        if limits.usd is not None and most_usd > limits.usd + _NOTHING_USD:
            raise HttpError(
                400,
                "spend_limit",
                f"The request may cost {most_usd:.4f} USD, and the API key may spend {limits.usd:g}: it can never fit.",
                hint="Ask for fewer tokens with max_tokens, or shorten the prompt.",
                param="max_tokens",
            )

    def _check_rates(self, limits: KeyLimits, account: _Account, tokens: int) -> None:
        now_s = self.monotonic()
        if limits.max_concurrency is not None and account.running >= limits.max_concurrency:
            message = f"The API key has {account.running} requests running, as many as it may."
            raise LimitReached("concurrency_limit", message, retry_after_s=_SOON_S, hint="Wait for one to end.")
        for code, what, limit, minute, amount in (
            ("requests_limit", "requests", limits.requests_per_min, account.requests, 1),
            ("tokens_limit", "tokens", limits.tokens_per_min, account.tokens, tokens),
        ):
            if limit is not None and minute.total(now_s) + amount > limit:
                wait_s = minute.wait_s(amount, limit, now_s)
                message = (
                    f"The API key may use {limit} {what} a minute; {minute.total(now_s)} are taken, {amount} asked."
                )
                raise LimitReached(code, message, retry_after_s=wait_s, hint=f"Try again in {math.ceil(wait_s)} s.")

    def _check_spend(self, limits: KeyLimits, account: _Account, most_usd: float) -> None:
        if limits.usd is None:
            return
        now = self._wall()
        spent = account.spent(limits, month_of(now))
        period = "this month" if limits.usd_period == "month" else "in all"
        message = f"The API key may spend {limits.usd:g} USD {period}; {spent:.4f} are spent"
        if spent + most_usd > limits.usd + _NOTHING_USD or spent >= limits.usd:
            wait_s = _seconds_to_next_month(now) if limits.usd_period == "month" else math.inf
            hint = "It can spend again next month." if limits.usd_period == "month" else "An admin can raise the limit."
            raise LimitReached("spend_limit", f"{message}.", retry_after_s=wait_s, hint=hint)
        if spent + account.reserved_usd + most_usd > limits.usd + _NOTHING_USD:
            hint = "Wait for running requests to end: what they do not use is free again."
            raise LimitReached("spend_limit", f"{message}, the rest is taken.", retry_after_s=_SOON_S, hint=hint)

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
