"""A gateway before replicas that respond as vLLM does, see `vllm_replica`."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import openai
import vllm_replica
from byte_replica import ByteReplica
from gateways_for_tests import RunningGateway, until

Respond = Callable[[str, dict[str, Any]], bytes]
_REVISIONS = itertools.count(1)


@contextlib.contextmanager
def serving(
    gateway: RunningGateway, *responders: Respond, engine: str = "vllm", name: str = "public"
) -> Iterator[list[ByteReplica]]:
    """The gateway serves a model by a replica for each responder, where it is called 'inner'."""
    revision = f"p{next(_REVISIONS)}"
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(vllm_replica.vllm_replica(one)) for one in responders or (vllm_replica.respond,)]
        for one in found if engine == "powerband" else ():
            one.paths = (*one.paths, "/readyz")
        replicas = [
            {"id": f"{revision}-{number}", "url": one.url, "model": "inner", "engine": engine}
            for number, one in enumerate(found)
        ]
        prices = {"usd_per_million_input": 1e6, "usd_per_million_output": 2e6}
        model = {"name": name, "replicas": replicas, **prices}
        gateway.admin.put("/admin/routes", json={"revision": revision, "models": [model]}).raise_for_status()
        until(lambda: set(gateway.replica_states().values()) == {"ready"})
        yield found


def client_of(gateway: RunningGateway, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0)


def new_key(gateway: RunningGateway, **limits: Any) -> tuple[str, str]:
    """Its id and its secret."""
    made = gateway.admin.post("/admin/keys", json={"name": "test", "limits": limits})
    made.raise_for_status()
    return made.json()["id"], made.json()["secret"]


def last_record(gateway: RunningGateway) -> dict[str, Any]:
    return gateway.records()[-1]
