"""Large texts are rendered and encoded without making small ones wait."""

from __future__ import annotations

import asyncio
import threading

from powerband.server.replica import LARGE_TEXT_BYTES, ServerState
from powerband.server.settings import ServerSettings
from powerband.spec.settings import EngineSettings


def test_any_number_of_large_texts_leaves_threads_to_small_ones() -> None:
    async def test() -> None:
        replica = ServerState(EngineSettings(), ServerSettings())
        gate = threading.Event()

        async def render(num_bytes: int, wait: bool) -> bool:
            async with replica.room_for_text(num_bytes):
                return await replica.in_thread(gate.wait if wait else gate.is_set)

        large = [asyncio.create_task(render(LARGE_TEXT_BYTES, wait=True)) for _ in range(8)]
        await asyncio.sleep(0)
        try:
            assert await asyncio.wait_for(render(LARGE_TEXT_BYTES - 1, wait=False), 30) is False
        finally:
            gate.set()
        assert await asyncio.gather(*large) == [True] * 8

    asyncio.run(test())
