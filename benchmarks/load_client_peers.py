"""How others read a stream, each by its own code, for load_clients.py to measure. Runs in the peer's own environment.

    python load_client_peers.py CLIENT URL USERS REQUESTS TOKENS     → one line of JSON

`USERS` users each send `REQUESTS` requests of `TOKENS` output tokens, one after the other. Counted are chunks with
tokens and the CPU seconds of this process, after every user has sent one request to warm up.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

Ask = Callable[[int], Awaitable[int]]  # number of the request → chunks with tokens


def body(number: int, tokens: int) -> dict[str, Any]:
    return {
        "model": "scripted",
        "prompt": f"Request {number}: tell me something about the standard library.",
        "max_tokens": tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def drive(ask: Ask, users: int, requests: int) -> None:
    await asyncio.gather(*(ask(user) for user in range(users)))
    before, started_s = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()

    async def user(number: int) -> int:
        return sum([await ask(number * requests + i) for i in range(requests)])

    chunks = sum(await asyncio.gather(*(user(number) for number in range(users))))
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(json.dumps({"chunks": chunks, "cpu_s": cpu_s, "wall_s": time.monotonic() - started_s}))


async def aiohttp_lines(url: str, users: int, requests: int, tokens: int) -> None:
    """A line at a time, json.loads of each, as most scripts do and vllm's did."""
    import aiohttp

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask(number: int) -> int:
            times_s = []
            async with session.post(f"{url}/v1/completions", json=body(number, tokens)) as response:
                async for line in response.content:
                    data = line.strip().removeprefix(b"data: ")
                    if data and data != b"[DONE]" and json.loads(data)["choices"]:
                        times_s.append(time.perf_counter())
            return len(times_s)

        await drive(ask, users, requests)


async def httpx_lines(url: str, users: int, requests: int, tokens: int) -> None:
    """`aiter_lines`, json.loads of each: the client that GuideLLM builds on."""
    import httpx

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(limits=limits, timeout=None) as client:  # noqa: S113 (the server is ours)

        async def ask(number: int) -> int:
            times_s = []
            async with client.stream("POST", f"{url}/v1/completions", json=body(number, tokens)) as response:
                async for line in response.aiter_lines():
                    data = line.removeprefix("data: ")
                    if data and data != "[DONE]" and json.loads(data)["choices"]:
                        times_s.append(time.perf_counter())
            return len(times_s)

        await drive(ask, users, requests)


async def vllm_function(url: str, users: int, requests: int, tokens: int) -> None:
    """The request function of `vllm bench serve`, with its session."""
    import aiohttp
    from vllm.benchmarks.lib.endpoint_request_func import RequestFuncInput, async_request_openai_completions

    connector = aiohttp.TCPConnector(limit=0, limit_per_host=0, ttl_dns_cache=300, keepalive_timeout=60)
    async with aiohttp.ClientSession(connector=connector, trust_env=True) as session:

        async def ask(number: int) -> int:
            asked = RequestFuncInput(
                prompt=body(number, tokens)["prompt"],
                api_url=f"{url}/v1/completions",
                prompt_len=10,
                output_len=tokens,
                model="scripted",
                ignore_eos=True,
            )
            output = await async_request_openai_completions(asked, session)
            if not output.success:
                raise RuntimeError(output.error)
            return len(output.itl) + 1

        await drive(ask, users, requests)


async def guidellm_backend(url: str, users: int, requests: int, tokens: int) -> None:
    """The backend that GuideLLM's workers call (0.8), without the processes and queues around it."""
    from guidellm.backends.openai.http import OpenAIHTTPBackend
    from guidellm.schemas import GenerationRequest, RequestInfo
    from guidellm.schemas.backends import OpenAIHTTPBackendArgs

    arguments = OpenAIHTTPBackendArgs(
        target=url, model="scripted", request_format="/v1/completions", max_tokens=tokens, validate_backend=False
    )
    backend = OpenAIHTTPBackend(arguments)
    await backend.process_startup()

    async def ask(number: int) -> int:
        info = RequestInfo()
        request = GenerationRequest(columns={"text_column": [body(number, tokens)["prompt"]]})
        async for _ in backend.resolve(request, info):
            continue
        return info.timings.token_iterations

    await drive(ask, users, requests)
    await backend.process_shutdown()


CLIENTS = {"aiohttp": aiohttp_lines, "httpx": httpx_lines, "vllm": vllm_function, "guidellm": guidellm_backend}


def main() -> None:
    name, url, users, requests, tokens = sys.argv[1:]
    name, _, loop = name.partition("+")
    if name == "guidellm":
        import guidellm  # noqa: F401 (it chooses the event loop)
    work = CLIENTS[name](url, int(users), int(requests), int(tokens))
    if loop == "uvloop":
        import uvloop

        uvloop.run(work)
    else:
        asyncio.run(work)


if __name__ == "__main__":
    main()
