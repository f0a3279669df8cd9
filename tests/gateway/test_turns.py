"""Steps of requests share the turns of the event loop: a bounded number in each, and tenants in rotation."""

from __future__ import annotations

import asyncio

from powerband.gateway.dispatch.turns import FairTurns

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
