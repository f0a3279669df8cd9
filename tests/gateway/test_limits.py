"""Limits hold for every 60 seconds and every sum of money, in any order of events; refusals say when to return."""

from __future__ import annotations

import asyncio
import math
import random
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powerband.gateway.accounts.keys import Key, KeyLimits
from powerband.gateway.accounts.limits import FREE, LimitReached, Limits, Reservation, TokenPrice, price_from
from powerband.gateway.request import GatewayRequest
from powerband.gateway.routes import ModelRoute
from powerband.web.errors import HttpError


@dataclass
class Clock:
    now: float = 1000.0
    wall: float = datetime(2026, 11, 22, tzinfo=UTC).timestamp()

    def pass_s(self, seconds: float) -> None:
        self.now += seconds
        self.wall += seconds


def limits_at(clock: Clock, spent: dict[str, tuple[float, float]] | None = None) -> Limits:
    return Limits(spent or {}, lambda: clock.now, lambda: clock.wall)


def key_with(**limits: object) -> Key:
    return Key(
        id="key_1",
        name="app",
        prefix="pb-",
        scopes=("infer",),
        limits=KeyLimits(**limits),
        created_at=0.0,  # type: ignore[arg-type]  # short
    )


def request(prompt: int = 1, output: int = 0, model: str = "demo") -> GatewayRequest:
    return GatewayRequest(id="req_1", endpoint="chat", model=model, prompt_tokens=prompt, output_tokens=output)


@dataclass
class Admitted:
    at: float
    reservation: Reservation
    prompt: int
    tokens: int
    usd: float
    running: bool = True
    counts: bool = True


@dataclass
class Oracle:
    """Remembers every request, and adds up again each time."""

    admitted: list[Admitted] = field(default_factory=list)

    def tokens(self, since: float) -> int:
        return sum(one.tokens for one in self.admitted if one.at > since and one.counts)

    def requests(self, since: float) -> int:
        return sum(one.counts for one in self.admitted if one.at > since)

    def running(self) -> list[Admitted]:
        return [one for one in self.admitted if one.running]

    def usd(self) -> float:
        return sum(one.usd for one in self.admitted if one.counts)


events = st.lists(
    st.one_of(
        st.tuples(st.just("pass"), st.floats(0, 40), st.just(0)),
        st.tuples(st.just("ask"), st.integers(1, 60), st.integers(0, 60)),
        st.tuples(st.just("settle"), st.integers(0, 9), st.floats(0, 1)),
        st.tuples(st.just("cancel"), st.integers(0, 9), st.just(0)),
    ),
    max_size=80,
)


@settings(max_examples=300)
@given(events=events)
def test_no_limit_is_ever_passed_and_no_refusal_is_without_reason(events: list[tuple[str, float, float]]) -> None:
    clock, oracle = Clock(), Oracle()
    key = key_with(requests_per_min=7, tokens_per_min=200, max_concurrency=3, usd=9.0, usd_period="total")
    limits = limits_at(clock)
    for what, first, second in events:
        running = oracle.running()
        if what == "pass":
            clock.pass_s(first)
        elif what == "ask":
            ask(oracle, limits, clock, key, int(first), int(second))
        elif running:
            one = running[int(first) % len(running)]
            one.running = False
            if what == "cancel":
                one.counts = False
                one.reservation.cancel()
            else:
                one.tokens, one.usd = math.floor(one.tokens * second), one.usd * second
                prompt = min(one.tokens, one.prompt)
                one.reservation.settle(prompt, one.tokens - prompt, one.usd)
        assert limits.used(key)["running"] == len(oracle.running())
    for one in oracle.running():
        one.reservation.cancel()


def ask(oracle: Oracle, limits: Limits, clock: Clock, key: Key, prompt: int, output: int) -> None:
    tokens, usd = prompt + output, (prompt + output) / 50
    try:
        reservation = limits.reserve(key, request(prompt, output), TokenPrice(0.02, 0.02))
    except LimitReached as error:
        refused_with_reason(oracle, limits, clock, key, error, tokens, usd)
        return
    oracle.admitted.append(Admitted(clock.now, reservation, prompt, tokens, usd))
    assert oracle.requests(clock.now - 60) <= 7
    assert oracle.tokens(clock.now - 60) <= 200
    assert len(oracle.running()) <= 3
    assert oracle.usd() <= 9.0 + 1e-6


def refused_with_reason(
    oracle: Oracle, limits: Limits, clock: Clock, key: Key, error: LimitReached, tokens: int, usd: float
) -> None:
    """A cell of a minute covers a second, so one second more than 60 may count."""
    match error.code:
        case "concurrency_limit":
            assert len(oracle.running()) == 3
        case "spend_limit":
            assert oracle.usd() + usd > 9.0 - 1e-6
        case "requests_limit":
            assert oracle.requests(clock.now - 61) + 1 > 7
        case "tokens_limit":
            assert oracle.tokens(clock.now - 61) + tokens > 200
    if error.code in ("requests_limit", "tokens_limit"):
        assert 0 < error.retry_after_s <= 61
        clock.pass_s(error.retry_after_s)
        assert refusal(limits, key, request(tokens), TokenPrice(0.02)) != error.code, (
            "it did not fit when it was said to"
        )


def refusal(limits: Limits, key: Key, asked: GatewayRequest, price: TokenPrice = FREE) -> str:
    """The code of what stands in its way, or ''."""
    try:
        limits.reserve(key, asked, price).cancel()
    except LimitReached as error:
        return error.code
    return ""


def test_a_hundred_at_once_do_not_slip_past() -> None:
    """Estimates are taken before the work begins, so a crowd that arrives together is held to the limit."""
    clock = Clock()
    limits, key = limits_at(clock), key_with(tokens_per_min=1000, max_concurrency=8)
    served, most = 0, 0
    chance = random.Random(0)

    async def client() -> None:
        nonlocal served, most
        for _ in range(20):
            try:
                reservation = limits.reserve(key, request(10, 20))
            except LimitReached:
                await asyncio.sleep(0)
                continue
            most = max(most, int(limits.used(key)["running"]))
            for _ in range(chance.randrange(5)):
                await asyncio.sleep(0)
            used = chance.randrange(21)
            served += 10 + used
            reservation.settle(10, used, 0.0)

    async def crowd() -> None:
        await asyncio.gather(*(client() for _ in range(100)))

    asyncio.run(crowd())
    assert most == 8
    assert 970 < served <= 1000  # not one token more, and no room left for another request
    assert limits.used(key)["tokens_last_min"] == served


def test_more_than_estimated_delays_what_comes_later() -> None:
    clock = Clock()
    limits, key = limits_at(clock), key_with(tokens_per_min=100)
    limits.reserve(key, request(10, 10)).settle(10, 90, 0.0)
    with pytest.raises(LimitReached, match="100 tokens per minute; 100 are used, 1 requested") as caught:
        limits.reserve(key, request(1))
    clock.pass_s(caught.value.retry_after_s or 0)
    limits.reserve(key, request(1)).cancel()


def test_a_limit_of_one_request_is_said_in_the_singular() -> None:
    limits, key = limits_at(Clock()), key_with(requests_per_min=1)
    limits.reserve(key, request(1)).settle(1, 1, 0.0)
    with pytest.raises(LimitReached, match="may use 1 request per minute; 1 are used, 1 requested"):
        limits.reserve(key, request(1))


def test_output_beyond_what_was_taken_counts_while_it_comes() -> None:
    limits, key = limits_at(Clock()), key_with(tokens_per_min=100)
    running = limits.reserve(key, request(10, 10))
    running.add_output_tokens(5)
    assert limits.used(key)["tokens_last_min"] == 20
    running.add_output_tokens(85)
    assert limits.used(key)["tokens_last_min"] == 95
    assert refusal(limits, key, request(10)) == "tokens_limit"
    running.settle(10, 85, 0.0)
    assert limits.used(key)["tokens_last_min"] == 95


def text(size: int, output: int = 0, *, num_sequences: int = 1, is_open_ended: bool = False) -> GatewayRequest:
    """A request of so many bytes, of which nobody knows yet how many tokens they are."""
    return GatewayRequest(
        id="req_1",
        endpoint="chat",
        model="demo",
        prompt_tokens=max(1, size // 4),
        max_prompt_tokens=size,
        output_tokens=output,
        max_output_tokens=output,
        num_sequences=num_sequences,
        is_open_ended=is_open_ended,
    )


def test_a_text_takes_half_a_token_a_byte_until_its_key_is_known_and_then_what_it_had() -> None:
    """Else a crowd of digits or of Chinese could take several times its limit in each minute."""
    limits, key = limits_at(Clock()), key_with(tokens_per_min=1000)
    running = limits.reserve(key, text(400))
    assert limits.used(key)["tokens_last_min"] == 200
    running.prompt_counted(100)
    assert limits.used(key)["tokens_last_min"] == 100
    running.settle(100, 0, 0.0)
    for _ in range(50):
        limits.reserve(key, text(8)).settle(2, 0, 0.0)
    before = limits.used(key)["tokens_last_min"]
    limits.reserve(key, text(400)).settle(400, 0, 0.0)
    dense = limits.used(key)["tokens_last_min"]
    assert dense == before + 400
    running = limits.reserve(key, text(400))
    assert limits.used(key)["tokens_last_min"] == min(dense + 400, 1000)
    running.cancel()


def test_thin_prompts_do_not_let_a_burst_of_dense_ones_through() -> None:
    limits, key = limits_at(Clock()), key_with(tokens_per_min=3000)
    for _ in range(20):
        limits.reserve(key, text(2500, 1)).settle(25, 1, 0.0)
    running = [limits.reserve(key, text(290, 1)) for _ in range(10)]
    with pytest.raises(LimitReached, match=r"not counted yet may have up to 2900, this one up to 290\.") as caught:
        limits.reserve(key, text(290, 1))
    assert caught.value.retry_after_s == 1.0
    for one in running:
        one.settle(290, 1, 0.0)
    assert limits.used(key)["tokens_last_min"] == 520 + 2910
    assert refusal(limits, key, text(290, 1)) == "tokens_limit"


def test_prompts_that_are_counted_or_given_as_ids_do_not_wait_for_each_other() -> None:
    limits, key = limits_at(Clock()), key_with(tokens_per_min=3000)
    running = []
    for _ in range(20):  # streams: the replica counts the prompt with the first token
        running.append(limits.reserve(key, text(400, 1)))
        running[-1].prompt_counted(100)
    limits.reserve(key, text(400, 1)).cancel()
    running.append(limits.reserve(key, text(400, 1)))
    limits.reserve(key, request(500, 1)).cancel()
    for one in running:
        one.settle(100, 1, 0.0)
    limits.reserve(key, text(800, 1)).cancel()


def test_a_count_that_no_prompt_can_have_does_not_raise_what_later_prompts_reserve() -> None:
    limits, key = limits_at(Clock()), key_with(tokens_per_min=1_000_000)
    limits.reserve(key, text(40)).settle(4000, 0, 0.0)
    limits.reserve(key, text(400))
    assert limits.used(key)["tokens_last_min"] == 4000 + 400


def test_a_text_that_fits_alone_is_let_in_alone() -> None:
    """By its bytes it could have more tokens than a minute allows; it is not refused for that."""
    limits, key = limits_at(Clock()), key_with(tokens_per_min=1000)
    running = limits.reserve(key, text(3000, 50))
    assert limits.used(key)["tokens_last_min"] == 1000
    assert refusal(limits, key, request(1)) == "tokens_limit"
    running.prompt_counted(700)
    limits.reserve(key, request(1)).cancel()
    running.settle(700, 10, 0.0)
    assert limits.used(key)["tokens_last_min"] == 710


def test_what_names_no_limit_is_capped_by_what_is_left() -> None:
    limits, key = limits_at(Clock()), key_with(tokens_per_min=10_000)
    caps = [limits.reserve(key, text(0, 256, is_open_ended=True), context=100_000) for _ in range(4)]
    assert [one.cap for one in caps] == [2500, 1875, 1406, 1054]
    assert limits.reserve(key, text(0, 512, num_sequences=2, is_open_ended=True), context=100_000).cap == 395
    assert limits.reserve(key, text(90, 256, is_open_ended=True), context=300).cap == 300 - 90


def test_what_names_no_limit_where_there_is_none_is_not_capped() -> None:
    limits = limits_at(Clock())
    for key in (None, key_with(), key_with(requests_per_min=3)):
        assert limits.reserve(key, text(10, 256, is_open_ended=True), context=1000).cap is None


def test_a_small_limit_caps_rather_than_refuses() -> None:
    limits, key = limits_at(Clock()), key_with(tokens_per_min=100)
    running = limits.reserve(key, text(40, 256, is_open_ended=True))
    assert running.cap == 90
    assert refusal(limits, key, text(40, 256, is_open_ended=True)) == "tokens_limit"


@settings(max_examples=200)
@given(
    asked=st.lists(
        st.tuples(
            st.integers(1, 400), st.integers(0, 60), st.integers(1, 3), st.booleans(), st.floats(0, 1), st.floats(0, 1)
        ),
        max_size=60,
    ),
    at_once=st.integers(1, 8),
)
def test_what_a_key_is_charged_never_exceeds_its_budget(asked: list[Any], at_once: int) -> None:
    """Under any interleaving, however dense prompts are and however long answers become, up to what they may be."""
    limits, key = limits_at(Clock()), key_with(usd=300.0, usd_period="total")
    price, running = TokenPrice(1.0, 2.0), []
    for size, output, num_sequences, is_open_ended, dense, made in asked:
        if len(running) >= at_once:
            running.pop(len(running) // 2)()
        told = text(size, output * num_sequences, num_sequences=num_sequences, is_open_ended=is_open_ended)
        try:
            taken = limits.reserve(key, told, price, context=500)
        except (LimitReached, HttpError):
            continue
        prompt, most = math.ceil(size * dense), output if taken.cap is None else taken.cap
        used = prompt, math.floor(most * num_sequences * made)
        if dense > 0.5:
            taken.prompt_counted(prompt)
        running.append(partial(taken.settle, *used, price.of(*used)))
    for end in running:
        end()
    assert limits.used(key)["usd"] <= 300.0 + 1e-6


def test_what_ends_after_its_minute_changes_nothing_any_more() -> None:
    clock = Clock()
    limits, key = limits_at(clock), key_with(tokens_per_min=100)
    long = limits.reserve(key, request(50, 50))
    clock.pass_s(61)
    later = limits.reserve(key, request(60))
    long.settle(50, 10, 0.0)
    assert limits.used(key)["tokens_last_min"] == 60
    later.cancel()


def test_only_the_first_end_counts() -> None:
    limits, key = limits_at(Clock()), key_with(max_concurrency=1, usd=10.0)
    reservation = limits.reserve(key, request(10))
    reservation.settle(10, 5, 1.0)
    reservation.settle(10, 5, 1.0)
    reservation.cancel()
    assert limits.used(key) == {"requests_last_min": 1, "tokens_last_min": 15, "running": 0, "usd": 1.0}


def test_a_forgotten_reservation_does_not_hold_its_place(caplog: pytest.LogCaptureFixture) -> None:
    limits, key = limits_at(Clock()), key_with(max_concurrency=1)
    limits.reserve(key, request(10))
    assert "neither settled nor cancelled" in caplog.text
    limits.reserve(key, request(10)).cancel()


def test_what_can_never_fit_says_so_and_is_not_worth_another_try() -> None:
    limits, key = limits_at(Clock()), key_with(tokens_per_min=100, usd=1.0, models=("demo",))
    for asked, price, status, code in (
        (request(90, 20), FREE, 400, "tokens_limit"),
        (request(1, 1), TokenPrice(0.75, 0.75), 400, "spend_limit"),
        (request(1, 1, "other"), FREE, 403, "model_not_allowed"),
    ):
        with pytest.raises(HttpError) as caught:
            limits.reserve(key, asked, price)
        assert (caught.value.http_status, caught.value.code) == (status, code)
    assert limits.used(key)["requests_last_min"] == 0


def test_spend_begins_anew_with_the_month_and_total_spend_never() -> None:
    clock = Clock()
    limits = limits_at(clock, {"key_1": (50.0, 9.5)})
    monthly, total = key_with(usd=10.0), key_with(usd=50.0, usd_period="total")
    with pytest.raises(LimitReached) as caught:
        limits.reserve(monthly, request(), TokenPrice(1.0))
    assert caught.value.retry_after_s == 9 * 86400  # 22 November to 1 December
    with pytest.raises(LimitReached) as caught:
        limits.reserve(total, request(), TokenPrice(1.0))
    assert caught.value.retry_after_s == math.inf
    clock.pass_s(9 * 86400)
    limits.reserve(monthly, request(), TokenPrice(1.0)).settle(1, 1, 0.75)
    assert limits.used(monthly)["usd"] == 0.75
    clock.wall -= 3600
    assert limits.used(monthly)["usd"] == 0.75
    assert limits.used(total)["usd"] == 50.75


def test_headers_say_what_is_left() -> None:
    clock = Clock(now=1000.25)
    limits, key = limits_at(clock), key_with(requests_per_min=10, tokens_per_min=100)
    assert limits.headers(key)["x-ratelimit-reset-requests"] == "0ms"
    running = limits.reserve(key, request(30, 10))
    assert limits.headers(key) == {
        "x-ratelimit-limit-requests": "10",
        "x-ratelimit-remaining-requests": "9",
        "x-ratelimit-reset-requests": "1m1s",
        "x-ratelimit-limit-tokens": "100",
        "x-ratelimit-remaining-tokens": "60",
        "x-ratelimit-reset-tokens": "1m1s",
    }
    clock.pass_s(60)
    assert limits.headers(key)["x-ratelimit-reset-tokens"] == "750ms"
    running.cancel()
    assert limits.headers(key_with()) == {}


def test_cost_is_prices_times_tokens() -> None:
    route = ModelRoute(name="demo", usd_per_million_input=0.5, usd_per_million_output=2.0)
    assert price_from(route).of(1000, 500) == pytest.approx(0.0015)
