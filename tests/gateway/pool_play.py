"""Plays at random with a pool in virtual time, and holds it against a plain model of its own after every move."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field, replace

from pool_world import replica, request

from powerband.dispatch.backend import ReplicaLoad
from powerband.dispatch.errors import DeadlineUnreachable, NoReplicaAvailable, PoolFull, QueueTimeout
from powerband.gateway.dispatch.pool import Lease, Pool
from powerband.gateway.options import PoolOptions
from powerband.gateway.request import GatewayRequest
from powerband.gateway.routes import ModelRoute, ReplicaAddress
from virtual_loop import VirtualLoop, virtually

SPARE = 2  # may wait at a replica
LONGEST_WAIT_S = 20.0
TICK_S = 0.05
BUSY_S = 0.5
SHORT = 100  # tokens; longer prompts do not go to replicas of the short lane
REFUSALS = (PoolFull, DeadlineUnreachable, QueueTimeout, NoReplicaAvailable)


@dataclass(eq=False)
class Asked:
    """A request that this world sent. waited: it was not served at once."""

    request: GatewayRequest
    number: int
    at_s: float
    avoid: tuple[str, ...] = ()
    task: asyncio.Task[Lease] | None = None
    waited: bool = False
    has_begun: bool = False

    @property
    def flow(self) -> tuple[str, int, bool]:
        return self.request.tenant, self.request.priority, self.request.prompt_tokens > SHORT

    @property
    def tokens(self) -> int:
        prompt = 0 if self.has_begun else self.request.prompt_tokens
        return prompt + self.request.output_tokens


@dataclass
class Known:
    """What this world knows of a replica's health: fall 2, rise 2, a first good probe is enough."""

    address: ReplicaAddress
    is_up: bool = False
    was_up: bool = False
    bad: int = 0
    good: int = 0
    changed_s: float = 0.0
    falls: int = 0  # with less than a minute between them
    out_until_s: float = 0.0


@dataclass
class World:
    loop: VirtualLoop
    rng: random.Random
    routing: str
    pool: Pool = field(init=False)
    known: dict[str, Known] = field(default_factory=dict)
    live: dict[Lease, Asked] = field(default_factory=dict)
    waiting: list[Asked] = field(default_factory=list)
    count: int = 0
    grants: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    busy: dict[tuple[str, str], float] = field(default_factory=dict)  # until then a replica gets nothing of a tenant

    def __post_init__(self) -> None:
        options = PoolOptions(
            routing=self.routing,  # type: ignore[arg-type]  # one of its names
            max_queued_requests=20,
            max_queued_tokens=4000,
            max_queue_wait_s=LONGEST_WAIT_S,
        )
        self.pool = Pool(options, clock=self.loop.time)

    # Moves.

    async def ask(self, like: Asked | None = None, avoid: tuple[str, ...] = ()) -> None:
        rng, now_s = self.rng, self.loop.time()
        self.count += 1
        asked = like and replace(like, number=self.count, at_s=now_s, avoid=avoid, waited=False, has_begun=False)
        if asked is None:
            prefix = tuple(b"%d" % i for i in range(rng.randrange(4)))
            made = request(
                str(self.count),
                tenant=rng.choice("abc"),
                priority=rng.choice((0, 0, 0, -1, 3)),
                prompt_tokens=rng.choice((1, 20, 60, 200)),
                output_tokens=rng.randrange(1, 80),
                arrival_s=now_s,
                deadline_s=now_s + rng.uniform(0.1, 15) if rng.random() < 0.3 else None,
                session=rng.choice(("", "s1", "s2")),
                prefix_keys=prefix,
            )
            asked = Asked(made, self.count, now_s, avoid)
        asked.task = asyncio.ensure_future(self.pool.lease(asked.request, avoid=avoid))
        self.waiting.append(asked)
        await self.look(just_asked=asked)

    async def close(self, lease: Lease, outcome: str | None = None) -> None:
        asked = self.live.pop(lease)
        outcome = outcome or self.rng.choice(("ok", "ok", "ok", "ok", "cancelled", "failed", "rejected"))
        lease.close(outcome, output_tokens=self.rng.randrange(asked.request.output_tokens + 1))  # type: ignore[arg-type]  # as above
        if self.rng.random() < 0.2:
            lease.close("failed")  # a second time is none
        if outcome == "rejected":
            self.busy[lease.replica.id, asked.request.tenant] = self.loop.time() + BUSY_S
        if outcome == "failed" and self.pool.may_retry(lease):
            await self.ask(asked, avoid=(*asked.avoid, lease.replica.id))

    def cancel(self, asked: Asked) -> None:
        assert asked.task is not None
        asked.task.cancel()

    def route(self, *addresses: ReplicaAddress) -> None:
        self.known = {a.id: self.known.get(a.id) or Known(a) for a in addresses}
        for address in addresses:
            self.known[address.id].address = address
        self.pool.update(ModelRoute(name="m", replicas=addresses, rate=self.rng.choice((None, 5.0))))

    def reroute(self) -> None:
        rng = self.rng
        addresses = [known.address for known in self.known.values()]
        move = rng.randrange(4)
        if move == 0 or not addresses:
            self.count += 1
            lane = rng.choice((None, None, SHORT))
            addresses.append(replica(f"n{self.count}", rng.randrange(1, 4), max_prompt_tokens=lane))
        elif move == 1 and len(addresses) > 1:
            addresses.remove(rng.choice(addresses))
        else:
            at = rng.randrange(len(addresses))
            addresses[at] = replace(addresses[at], draining=not addresses[at].draining)
        self.route(*addresses)

    def probe(self, name: str, is_good: bool) -> None:
        backend, known, now_s = next(m for m in self.pool.backends if m.id == name), self.known[name], self.loop.time()
        if is_good:
            known.bad, known.good = 0, known.good + 1
            is_well = known.good >= 2 and now_s >= known.out_until_s
            if not known.is_up and (is_well or not known.was_up):
                known.is_up, known.was_up, known.changed_s = True, True, now_s
            if backend.probe_succeeded(now_s):
                self.pool.changed(backend)
        else:
            known.bad, known.good = known.bad + 1, 0
            if known.is_up and known.bad == 2:
                known.falls = known.falls + 1 if now_s - known.changed_s <= 60 else 1
                if known.falls > 1:
                    known.out_until_s = now_s + min(5 * 2 ** (known.falls - 2), 60)
                known.is_up, known.changed_s = False, now_s
            if backend.probe_failed(now_s, "http_503"):
                self.pool.changed(backend)
        assert backend.is_ready == known.is_up, f"{name} is judged wrongly"

    def report(self, name: str) -> None:
        backend = next(m for m in self.pool.backends if m.id == name)
        running, waiting = self.rng.randrange(4), self.rng.choice((0, 0, 0, 1, 2, 5))
        self.pool.reported(backend, ReplicaLoad(running=running, waiting=waiting))

    async def move(self) -> None:
        rng, names = self.rng, list(self.known)
        what = rng.random()
        if what < 0.40:
            await self.ask()
        elif what < 0.62 and self.live:
            await self.close(rng.choice(list(self.live)))
        elif what < 0.67 and self.live:
            lease = rng.choice(list(self.live))
            lease.first_token(rng.choice((None, 7)))
            self.live[lease].has_begun = True
            lease.progress()
        elif what < 0.73 and self.waiting:
            asked = rng.choice(self.waiting)
            if self.live and rng.random() < 0.7:
                await self.close(rng.choice(list(self.live)), "ok")  # perhaps its place, in the same moment
            self.cancel(asked)
        elif what < 0.78:
            self.reroute()
        elif what < 0.90 and names:
            self.probe(rng.choice(names), rng.random() < 0.75)
        elif what < 0.93 and names:
            self.report(rng.choice(names))
        else:
            for _ in range(rng.randrange(1, 60)):
                await asyncio.sleep(TICK_S)
                await self.look()

    # What must be so.

    async def look(self, just_asked: Asked | None = None) -> None:
        for _ in range(4):
            await asyncio.sleep(0)
        before = list(self.waiting)
        for asked in before:
            assert asked.task is not None
            if not asked.task.done():
                asked.waited = True
                continue
            self.waiting.remove(asked)
            if asked.task.cancelled():
                continue
            problem = asked.task.exception()
            if problem is None:
                self.granted(asked, asked.task.result(), before, just_asked)
            else:
                self.was_refused(asked, problem)
        self.check()

    def was_refused(self, asked: Asked, problem: BaseException) -> None:
        assert isinstance(problem, REFUSALS), repr(problem)
        assert problem.retry_after_s is not None
        assert problem.retry_after_s > 0
        name = type(problem).__name__
        self.refused[name] = self.refused.get(name, 0) + 1
        if isinstance(problem, PoolFull | DeadlineUnreachable):
            assert self.loop.time() == asked.at_s, "refused late"
            assert not asked.avoid, "a second attempt is refused"
        if isinstance(problem, DeadlineUnreachable):
            assert asked.request.deadline_s is not None
        if isinstance(problem, NoReplicaAvailable):
            assert not any(known.is_up and not known.address.draining for known in self.known.values())

    def granted(self, asked: Asked, lease: Lease, before: list[Asked], just_asked: Asked | None) -> None:
        self.grants += 1
        self.live[lease] = asked
        known = self.known.get(lease.replica.id)
        assert known is not None, "a replica that is gone"
        assert known.is_up, "a replica that is not ready"
        assert not known.address.draining, "a replica that drains"
        assert not self.is_paused(lease.replica.id, asked), "a replica that has just refused one of this tenant"
        limit = lease.replica.max_prompt_tokens
        assert limit is None or asked.request.prompt_tokens <= limit or not self.serves_long(), "too long for it"
        if lease.replica.id in asked.avoid:
            lane = [k for k in self.lane(asked) if k.address.id not in asked.avoid]
            assert not lane, "there was another one"
        if asked.waited or asked is just_asked:
            for other in before:
                if other is asked or other.avoid or asked.avoid or other.task is None or other.task.done():
                    continue
                if other.flow == asked.flow and self.routing == "least-outstanding":
                    assert other.number > asked.number, "it overtook one of the same tenant"
                if other.flow[2] == asked.flow[2] and not self.is_paused(lease.replica.id, other):
                    assert other.request.priority >= asked.request.priority, "a higher priority waits"

    def is_paused(self, replica: str, asked: Asked) -> bool:
        return self.loop.time() < self.busy.get((replica, asked.request.tenant), 0.0)

    def serves_long(self) -> bool:
        return any(k.address.max_prompt_tokens is None for k in self.known.values())

    def lane(self, asked: Asked) -> list[Known]:
        """The replicas that may serve it now."""
        up = [k for k in self.known.values() if k.is_up and not k.address.draining]
        short = [k for k in up if k.address.max_prompt_tokens is not None]
        long = [k for k in up if k.address.max_prompt_tokens is None]
        if not self.serves_long():
            return short
        return (short or long) if asked.request.prompt_tokens <= SHORT else long

    def check(self) -> None:
        shown, now_s = self.pool.snapshot(), self.loop.time()
        assert shown.queued == len(self.waiting), "requests are lost or made up"
        assert shown.queued_tokens == sum(a.request.prompt_tokens + a.request.output_tokens for a in self.waiting)
        # Tenants that hold less than half of their share are admitted to a full queue: half as many again at most.
        assert shown.queued <= 30 + sum(bool(asked.avoid) for asked in self.waiting), "more waits than may"
        by_replica: dict[str, list[Asked]] = {}
        for lease, asked in self.live.items():
            by_replica.setdefault(lease.replica.id, []).append(asked)
        members = {backend.id: backend for backend in self.pool.backends}
        for state in shown.replicas:
            there = by_replica.get(state.id, [])
            assert state.inflight == len(there), "a place is lost or given twice"
            assert state.inflight <= self.known[state.id].address.max_num_seqs + SPARE, "too many at once"
            assert members[state.id].outstanding == sum(asked.tokens for asked in there), "tokens are miscounted"
        for asked in self.waiting:
            assert now_s - asked.at_s <= LONGEST_WAIT_S + TICK_S, "it waits too long"
            if asked.request.deadline_s is not None and not asked.avoid:
                assert now_s <= asked.request.deadline_s + TICK_S, "it waits past its deadline"
            behind = asked.avoid and any(
                a.avoid and a.flow == asked.flow and a.number < asked.number for a in self.waiting
            )
            for known in self.lane(asked):
                if behind or known.address.id in asked.avoid:
                    continue
                backend = members[known.address.id]
                is_idle = len(backend.in_flight) < backend.limit and not self.is_paused(backend.id, asked)
                assert not (is_idle and backend.breaker.is_closed), "it waits though there is a place"

    async def end(self) -> None:
        for asked in list(self.waiting):
            self.cancel(asked)
        for lease in list(self.live):
            self.live.pop(lease)
            lease.close("ok")
        while self.waiting:
            await self.look()
            for lease in list(self.live):
                self.live.pop(lease)
                lease.close("ok")
        self.check()
        assert not any(backend.outstanding or backend.in_flight for backend in self.pool.backends)


def play(seed: int, moves: int = 400, routing: str = "least-outstanding") -> World:
    async def test(loop: VirtualLoop) -> World:
        world = World(loop, random.Random(seed), routing)
        world.route(replica("a", 2), replica("b", 3), replica("s", 2, max_prompt_tokens=SHORT))
        for name in ("a", "b", "s"):
            world.probe(name, True)
        for _ in range(moves):
            await world.move()
            await world.look()
        await world.end()
        return world

    return virtually(test, within_s=1e6)
