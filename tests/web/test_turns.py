"""Steps of requests share the turns of the event loop: a bounded number in each, and tenants in rotation."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from powerband.errors import InvalidRequest
from powerband.web.turns import LARGE_BYTES, Decoding, FairTurns

NUM_PER_TURN = 4


def played(steps: list[str], *, cancelled: int = 0) -> list[list[str]]:
    """The tenants whose steps ran, by turn of the event loop, when all ask at once. cancelled: how many leave then."""
    found: list[list[str]] = []

    async def step(turns: FairTurns, tenant: str) -> None:
        await turns.turn(tenant)
        found[-1].append(tenant)

    async def test() -> None:
        turns = FairTurns(NUM_PER_TURN)
        found.append([])
        tasks = [asyncio.create_task(step(turns, tenant)) for tenant in steps]
        await asyncio.sleep(0)
        for task in tasks[NUM_PER_TURN : NUM_PER_TURN + cancelled]:
            task.cancel()
        while not all(task.done() for task in tasks):
            found.append([])
            await asyncio.sleep(0)

    asyncio.run(test())
    return [turn for turn in found if turn]


def test_a_few_steps_run_at_once() -> None:
    assert played(["a"] * NUM_PER_TURN) == [["a"] * NUM_PER_TURN]


def test_a_burst_runs_over_many_turns_and_another_tenant_waits_for_one() -> None:
    turns = played(["a"] * 900 + ["b"])
    assert max(map(len, turns)) == NUM_PER_TURN
    assert sum(map(len, turns)) == 901
    assert "b" in turns[1]


def test_clients_that_leave_take_no_turns() -> None:
    turns = played(["a"] * 50, cancelled=30)
    assert [len(turn) for turn in turns] == [NUM_PER_TURN] * 5


# ---- large bodies

LARGE = b"x" * (LARGE_BYTES + 1)


class Decoder:
    """Decodes a body when `release` is set. begun: of the bodies whose decoding has begun, the first letters."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.release = threading.Event()

    def of(self, tenant: str) -> Callable[[bytes], bool]:
        def decode(_: bytes) -> bool:
            self.begun.append(tenant)
            return self.release.wait(20)

        return decode


def test_a_large_body_is_decoded_while_others_are_served() -> None:
    async def test() -> None:
        decoding, decoder = Decoding(FairTurns(NUM_PER_TURN)), Decoder()
        large = asyncio.create_task(decoding.decode("a", LARGE, decoder.of("a")))
        await until(lambda: decoder.begun)
        assert await decoding.decode("b", b"small", len) == 5
        assert not large.done()
        decoder.release.set()
        assert await large
        decoding.close()

    asyncio.run(test())


def test_large_bodies_are_decoded_one_after_another_and_tenants_take_turns() -> None:
    async def test() -> None:
        decoding, decoder = Decoding(FairTurns(NUM_PER_TURN)), Decoder()
        tasks = [asyncio.create_task(decoding.decode(one, LARGE, decoder.of(one))) for one in "aaaab"]
        await until(lambda: decoder.begun)
        await asyncio.sleep(0)
        assert decoder.begun == ["a"]
        tasks[1].cancel()  # its client leaves
        decoder.release.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert decoder.begun == ["a", "b", "a", "a"]
        decoding.close()

    asyncio.run(test())


def test_a_client_that_leaves_in_its_turn_passes_it_on() -> None:
    async def test() -> None:
        decoding, decoder = Decoding(FairTurns(NUM_PER_TURN)), Decoder()
        first = asyncio.create_task(decoding.decode("a", LARGE, decoder.of("a")))
        await until(lambda: decoder.begun)
        second = asyncio.create_task(decoding.decode("a", LARGE, decoder.of("b")))
        third = asyncio.create_task(decoding.decode("a", LARGE, decoder.of("c")))
        await asyncio.sleep(0)
        first.add_done_callback(lambda _: second.cancel())  # when its turn has come, before it knows
        decoder.release.set()
        assert await third
        assert decoder.begun in (["a", "c"], ["a", "b", "c"])
        assert await decoding.decode("a", LARGE, decoder.of("d"))
        decoding.close()

    asyncio.run(test())


def test_what_decoding_raises_reaches_the_request_and_leaves_the_turn_to_others() -> None:
    def fails(_: bytes) -> None:
        raise InvalidRequest("No.")

    async def test() -> None:
        decoding = Decoding(FairTurns(NUM_PER_TURN))
        for _ in range(2):
            with pytest.raises(InvalidRequest):
                await decoding.decode("a", LARGE, fails)
        decoding.close()

    asyncio.run(test())


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)
