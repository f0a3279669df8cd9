"""Prefixes, sessions, weights: properties of their bookkeeping, and a fleet in virtual time that compares policies."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter, OrderedDict
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pool_world import make_pool, replica, request

from powerband.dispatch.prefix import PrefixIndex, prefix_bytes, prefix_keys
from powerband.gateway.dispatch.pool import Pool
from powerband.gateway.request import GatewayRequest
from virtual_loop import VirtualLoop, virtually


@settings(max_examples=100)
@given(st.binary(max_size=3000), st.binary(max_size=3000), st.binary(max_size=3000))
def test_prompts_share_keys_exactly_as_far_as_they_begin_alike(common: bytes, one: bytes, other: bytes) -> None:
    first, second = common + one, common + other
    keys, others = prefix_keys("chat", first, "t"), prefix_keys("chat", second, "t")
    alike = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
    shared = sum(prefix_bytes(i + 1) <= alike for i in range(min(len(keys), len(others))))
    assert keys[:shared] == others[:shared]
    assert not set(keys[shared:]) & set(others[shared:])
    assert prefix_bytes(len(keys)) <= len(first)


def test_tenants_salts_and_endpoints_share_no_keys() -> None:
    prompt = b"x" * 1000
    variants = [
        ("chat", "a", b""),
        ("chat", "b", b""),
        ("completions", "a", b""),
        ("chat", "a", b"b"),
        ("chat", "", b"a"),
    ]
    keys = [prefix_keys(endpoint, prompt, tenant, salt) for endpoint, tenant, salt in variants]  # type: ignore[arg-type]  # both are endpoints
    assert len({key for one in keys for key in one}) == sum(len(one) for one in keys)


def test_a_long_prompt_has_few_keys() -> None:
    assert len(prefix_keys("chat", b"x" * (1 << 16), "t")) == 65
    assert len(prefix_keys("chat", b"x" * (8 << 20), "t")) == 128


def test_a_conversation_s_next_turn_begins_as_the_last() -> None:
    turns = [{"role": "user" if i % 2 == 0 else "assistant", "content": f"turn {i} " * 40} for i in range(6)]
    first, second = (prefix_keys("chat", json.dumps(turns[:n]).encode(), "t") for n in (3, 5))
    assert len(first) >= 3
    assert second[: len(first)] == first


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 12)), max_size=40), st.integers(1, 30))
def test_the_index_knows_what_a_plain_memory_would(sent: list[tuple[int, int]], most: int) -> None:
    index, plain = PrefixIndex(most), OrderedDict[bytes, None]()
    for family, length in sent:
        keys = [b"%d %d" % (family, i) for i in range(length)]
        for key in reversed(keys):
            plain.pop(key, None)
            plain[key] = None
        while len(plain) > most:
            plain.popitem(last=False)
        index.add("r", keys)
    for family in range(6):
        keys = [b"%d %d" % (family, i) for i in range(12)]
        matched = next((i for i, key in enumerate(keys) if key not in plain), 12)
        assert index.cached_share("r", keys) == pytest.approx(prefix_bytes(matched) / prefix_bytes(12))
        assert index.cached_share("other", keys) == 0


def test_a_session_stays_while_its_replica_has_a_place() -> None:
    async def test(loop: VirtualLoop) -> None:
        pool = make_pool(loop, replica("a", 2), replica("b", 8), routing="session")
        first = await pool.lease(request(session="s", tenant="t"))
        leases = [await pool.lease(request(session="s", tenant="t")) for _ in range(3)]
        assert {lease.replica.id for lease in leases} == {first.replica.id}
        moved = [await pool.lease(request(session="s", tenant="t")) for _ in range(8)]
        assert "b" in {lease.replica.id for lease in moved}
        assert (await pool.lease(request(session="s", tenant="other"))) is not None

    virtually(test)


@pytest.mark.parametrize("routing", ["least-outstanding", "prefix"])
def test_a_replica_of_twice_the_size_gets_twice_as_much(routing: str) -> None:
    async def test(loop: VirtualLoop) -> None:
        pool = make_pool(loop, replica("small", 20), replica("large", 40), routing=routing)
        keys = (b"1", b"2")
        leases = [await pool.lease(request(prefix_keys=keys)) for _ in range(48)]
        large = sum(lease.replica.id == "large" for lease in leases)
        assert 30 <= large <= 36

    virtually(test)


def test_weights_share_the_tokens() -> None:
    async def test(loop: VirtualLoop) -> None:
        rng = random.Random(1)
        pool = make_pool(
            loop, replica("a", 99, weight=3.0), replica("b", 99), replica("spare", 99, weight=0.0), routing="weighted"
        )
        sent: Counter[str] = Counter()
        for _ in range(400):
            asked = request(output_tokens=rng.randrange(1, 500))
            lease = await pool.lease(asked)
            sent[lease.replica.id] += lease.in_flight.tokens
            lease.close("ok")
        assert sent["a"] / sent["b"] == pytest.approx(3.0, rel=0.05)
        assert sent["spare"] == 0

    virtually(test)


# A fleet: replicas with a prefix cache of their own, whose prefill takes as long as what is not cached.

PREFILL_TOKENS_PER_S, DECODE_S = 4000.0, 2.0
BYTES_PER_TOKEN = 4
CACHED_BLOCKS = 3000


@dataclass
class Fleet:
    loop: VirtualLoop
    pool: Pool
    caches: dict[str, PrefixIndex] = field(default_factory=dict)
    asked: float = 0.0
    found: float = 0.0
    loads: list[float] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)

    async def serve(self, one: GatewayRequest) -> None:
        start_s = self.loop.time()
        lease = await self.pool.lease(one)
        cache = self.caches.setdefault(lease.replica.id, PrefixIndex(CACHED_BLOCKS))
        share = cache.cached_share(lease.replica.id, one.prefix_keys)
        cache.add(lease.replica.id, one.prefix_keys)
        self.asked += one.prompt_tokens
        self.found += share * one.prompt_tokens
        await asyncio.sleep(one.prompt_tokens * (1 - share) / PREFILL_TOKENS_PER_S)
        lease.first_token()
        self.ttft_s.append(self.loop.time() - start_s)
        await asyncio.sleep(DECODE_S)
        lease.close("ok", output_tokens=one.output_tokens)

    async def watch(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            there = [one.inflight for one in self.pool.snapshot().replicas]
            if sum(there) >= 4 * len(there):
                self.loads.append(max(there) / (sum(there) / len(there)))


@dataclass(frozen=True)
class Figures:
    hit_rate: float
    max_of_mean: float
    mean_ttft_s: float


def conversations(rng: random.Random, count: int) -> list[tuple[float, GatewayRequest]]:
    """Turns of conversations that share one of a few system prompts and grow; 12 a second."""
    found = []
    for chat in range(count // 6):
        text = f"system {rng.randrange(8)} ".encode() * 200
        at_s = rng.random() * count / 12
        for turn in range(6):
            text += f"chat {chat} turn {turn} ".encode() * rng.randrange(40, 120)
            tokens = len(text) // BYTES_PER_TOKEN
            keys = prefix_keys("chat", text, "t")
            made = request(
                f"{chat}.{turn}", prompt_tokens=tokens, output_tokens=200, session=f"{chat}", prefix_keys=keys
            )
            found.append((at_s, made))
            at_s += rng.uniform(3, 10)
    return sorted(found, key=lambda one: one[0])


def one_hot_prefix(rng: random.Random, count: int) -> list[tuple[float, GatewayRequest]]:
    """Everybody asks the same document something."""
    keys = prefix_keys("chat", b"the document " * 1000, "t")
    made = [request(str(i), prompt_tokens=3300, output_tokens=200, prefix_keys=keys) for i in range(count)]
    return [(i / 12, one) for i, one in enumerate(made)]


def figures(routing: str, load: list[tuple[float, GatewayRequest]], max_num_seqs: int = 16) -> Figures:
    async def test(loop: VirtualLoop) -> Figures:
        addresses = [replica(f"r{i}", max_num_seqs) for i in range(4)]
        fleet = Fleet(loop, make_pool(loop, *addresses, routing=routing))
        watching = asyncio.ensure_future(fleet.watch())
        start_s, tasks = loop.time(), []
        for at_s, one in load:
            await asyncio.sleep(start_s + at_s - loop.time())
            tasks.append(asyncio.ensure_future(fleet.serve(one)))
        await asyncio.gather(*tasks)
        watching.cancel()
        loads = sorted(fleet.loads)
        return Figures(fleet.found / fleet.asked, loads[int(0.95 * len(loads))], sum(fleet.ttft_s) / len(fleet.ttft_s))

    return virtually(test)


def test_prefix_routing_finds_more_than_the_others_without_more_imbalance() -> None:
    by_policy = {
        routing: figures(routing, conversations(random.Random(7), 1200))
        for routing in ("prefix", "session", "least-outstanding", "weighted")
    }
    prefix, session, least = (by_policy[name] for name in ("prefix", "session", "least-outstanding"))
    assert prefix.hit_rate > 0.70 > least.hit_rate + 0.15
    assert prefix.hit_rate > session.hit_rate - 0.05  # which has to be told the sessions
    assert prefix.mean_ttft_s < 0.7 * least.mean_ttft_s
    assert prefix.max_of_mean < 1.6


def test_a_hot_prefix_is_spread() -> None:
    found = figures("prefix", one_hot_prefix(random.Random(7), 600))
    assert found.max_of_mean <= 1.5
    assert found.hit_rate > 0.95


def test_when_all_is_full_the_place_that_becomes_free_goes_to_who_it_suits() -> None:
    load = conversations(random.Random(3), 900)
    full = {routing: figures(routing, load, max_num_seqs=3) for routing in ("prefix", "least-outstanding")}
    assert full["prefix"].hit_rate > full["least-outstanding"].hit_rate + 0.05
