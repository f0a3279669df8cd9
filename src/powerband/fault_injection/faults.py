"""What clients do to servers, on purpose: cancel in storms, read slowly, send nonsense. For drills on one's own server.

While a fault is injected, well-behaved requests probe whether others are hurt by it. Everything is bounded, and goes to
this machine only unless it is allowed to leave it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import random
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

from powerband.bench.client.http import post
from powerband.bench.client.messages import ServerAddress
from powerband.errors import UsageError
from powerband.fault_injection.corpus import generation_body, http_request, malformed_requests
from powerband.http_client.connection import tls_context
from powerband.web.authority import split_authority

FAULTS = {
    "cancel-storm": "clients that leave in the middle of their answers, after a random number of chunks",
    "slow-readers": "streams of which a few bytes are read every so often",
    "half-open": "connections that send half a request, or one byte every so often, and wait",
    "malformed": "wrong JSON, wrong types, huge numbers, deep nesting, wrong HTTP, floods of headers",
    "oversized": "bodies of 64 MiB, with their length and in chunks",
    "connection-flood": "connections that open and close without a request",
}
MAX_CONNECTIONS, MAX_SECONDS, MAX_BYTES = 1000, 600.0, 1 << 30
OVERSIZED_BYTES = 64 << 20
_PATIENCE_S = 3.0  # for an answer to what is wrong
_PROBES, _PROBE_GAP_S = 5, 0.1
_PIECE = b"x" * (64 << 10)


@dataclass(frozen=True, slots=True)
class ProbeLatencies:
    """Well-behaved requests. Seconds from connecting to the whole answer, of those that were answered."""

    sent: int
    failed: int
    median_s: float | None
    worst_s: float | None

    @classmethod
    def of(cls, found: Sequence[float | None]) -> ProbeLatencies:
        """None in `found`: it failed."""
        times_s = [time_s for time_s in found if time_s is not None]
        middle_s = median(times_s) if times_s else None
        return cls(len(found), len(found) - len(times_s), middle_s, max(times_s, default=None))


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultResult:
    """answers: how often the server did what: a status, 'closed', 'reset', 'no answer' (in time), 'held' (open until
    the fault's end), 'cancelled' (by us), 'no connection'. cases: the last answer to each wrong request, by its name.
    """

    kind: str
    seconds: float
    sent: int  # requests or connections
    bytes_sent: int
    answers: dict[str, int]
    cases: dict[str, str]
    before: ProbeLatencies
    during: ProbeLatencies
    after: ProbeLatencies

    @property
    def still_answers(self) -> bool:
        return self.after.failed < self.after.sent

    @property
    def server_errors(self) -> int:
        """Answers that blame the server for what the client did."""
        return sum(times for answer, times in self.answers.items() if answer.startswith("5") and answer != "503")

    @property
    def slowdown(self) -> float | None:
        """The probes' median during the fault, in multiples of that before it; None where none was answered."""
        if self.before.median_s is None or self.during.median_s is None:
            return None
        return self.during.median_s / self.before.median_s

    def rows(self) -> list[list[str]]:
        """As a table of two columns."""
        answers = ", ".join(f"{count:,} × {answer}" for answer, count in sorted(self.answers.items()))
        rows = [
            ["fault", f"{self.kind}, {self.seconds:.1f} s"],
            ["sent", f"{self.sent:,}, {self.bytes_sent / 1e6:,.1f} MB"],
            ["answers", answers or "none"],
        ]
        for name, probes in (("before", self.before), ("during", self.during), ("after", self.after)):
            times = "no answer" if probes.median_s is None else f"{1000 * probes.median_s:.1f} ms at the median"
            rows.append([f"others {name}", f"{probes.sent - probes.failed} of {probes.sent} answered, {times}"])
        return rows


async def run_fault(
    kind: str,
    target: ServerAddress,
    *,
    seconds: float,
    intensity: int,
    allow_remote: bool = False,
    probe_patience_s: float = 5.0,
) -> FaultResult:
    """Inject one of FAULTS for so long, with `intensity` connections at a time. A probe that is not answered within
    `probe_patience_s` has failed.

    Raises UsageError for an unknown kind, for more than the limits above, and for a target beyond this machine that was
    not allowed.
    """
    if kind not in _ONCE:
        raise UsageError(f"Unknown fault '{kind}'.", hint=f"There are: {', '.join(FAULTS)}.", param="fault")
    if not (0 < seconds <= MAX_SECONDS and 1 <= intensity <= MAX_CONNECTIONS):
        raise UsageError(
            f"A fault of {intensity} connections for {seconds:g} s.",
            hint=f"At most {MAX_CONNECTIONS} connections, and {MAX_SECONDS:g} s.",
            param="intensity",
        )
    if not allow_remote:
        await _check_is_local(target)
    before = await _probe_several(target, probe_patience_s)
    injection = _Injection(target, time.monotonic() + seconds, malformed_requests(target))
    async with asyncio.TaskGroup() as group:
        probing = group.create_task(_keep_probing(injection, probe_patience_s))
        for _ in range(intensity):
            group.create_task(_repeat(injection, _ONCE[kind]))
    during = probing.result()
    return FaultResult(
        kind=kind,
        seconds=seconds,
        sent=injection.sent,
        bytes_sent=injection.bytes_sent,
        answers=dict(injection.answers),
        cases=dict(injection.cases),
        before=ProbeLatencies.of(before),
        during=ProbeLatencies.of(during),
        after=ProbeLatencies.of(await _probe_several(target, probe_patience_s)),
    )


@dataclass(slots=True)
class _Injection:
    """What is being done, and what came of it so far. ends_at: on the monotonic clock. corpus: of wrong requests."""

    target: ServerAddress
    ends_at: float
    corpus: dict[str, bytes]
    sent: int = 0
    bytes_sent: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    cases: dict[str, str] = field(default_factory=dict)
    chance: random.Random = field(default_factory=lambda: random.Random(0))  # noqa: S311 (no secret)

    @property
    def left_s(self) -> float:
        return self.ends_at - time.monotonic() if self.bytes_sent < MAX_BYTES else 0.0

    @contextlib.asynccontextmanager
    async def connection(self, receive_buffer: int = 0) -> AsyncIterator[_RawConnection]:
        """A new one. receive_buffer: of the socket, in bytes; 0: the system's. Raises OSError."""
        scheme, _, rest = self.target.base.partition("://")
        host, port = split_authority(rest.partition("/")[0], 443 if scheme == "https" else 80)
        tls = tls_context(self.target.insecure) if scheme == "https" else None
        reader, writer = await asyncio.open_connection(host, port, ssl=tls, limit=receive_buffer or 1 << 16)
        if receive_buffer:
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        try:
            yield _RawConnection(self, reader, writer)
        finally:
            writer.transport.abort()


@dataclass(slots=True)
class _RawConnection:
    """One connection, whose bytes count."""

    injection: _Injection
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        self.injection.bytes_sent += len(data)
        self.writer.write(data)
        await self.writer.drain()

    async def status(self) -> str:
        """Of the answer that begins; 'closed' for none."""
        line = await self.reader.readuntil(b"\n")
        parts = line.split()
        return parts[1].decode(errors="replace") if line.startswith(b"HTTP/") and len(parts) > 1 else "no HTTP"


_Once = Callable[[_Injection], Awaitable[str]]


async def _repeat(injection: _Injection, once: _Once) -> None:
    """One connection after the other until the end."""
    while injection.left_s > 0:
        injection.sent += 1
        try:
            async with asyncio.timeout(injection.left_s + _PATIENCE_S):
                answer = await once(injection)
        except TimeoutError:
            answer = "no answer"
        except asyncio.IncompleteReadError:
            answer = "closed"
        except asyncio.LimitOverrunError:
            answer = "no HTTP"
        except ConnectionResetError:
            answer = "reset"
        except OSError:
            answer = "no connection"
            await asyncio.sleep(_PROBE_GAP_S)  # a server that takes no more is not asked at once
        injection.answers[answer] += 1


async def _cancel(injection: _Injection) -> str:
    after = injection.chance.randrange(8)  # chunks
    async with injection.connection() as wire:
        await wire.send(http_request(injection.target, generation_body(injection.target, 64)))
        if (status := await wire.status()) != "200":
            return status
        while after > 0:
            piece = await wire.reader.read(1 << 16)
            if not piece:
                return "closed"
            after -= piece.count(b"data:")
    return "cancelled"


async def _read_slowly(injection: _Injection) -> str:
    async with injection.connection(receive_buffer=4096) as wire:
        await wire.send(http_request(injection.target, generation_body(injection.target, 2048)))
        while (left_s := injection.left_s) > 0:
            if not await wire.reader.read(1 + injection.chance.randrange(16)):
                return "closed"
            await asyncio.sleep(min(0.2, left_s))
    return "held"


async def _hold_half_open(injection: _Injection) -> str:
    whole = http_request(injection.target, generation_body(injection.target, 4))
    head = whole.index(b"\r\n\r\n")
    # Nothing, half a head, half a body; and a head that comes byte by byte.
    begun = injection.chance.choice((0, head // 2, head + 4, len(whole) - 5))
    is_dribbling = begun == 0 and injection.chance.random() < 0.5
    async with injection.connection() as wire:
        await wire.send(whole[:begun])
        while (left_s := injection.left_s) > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(0.2, left_s)):
                    return await wire.status()
            if is_dribbling and begun < head:
                await wire.send(whole[begun : begun + 1])
                begun += 1
    return "held"


async def _send_malformed(injection: _Injection) -> str:
    name = list(injection.corpus)[injection.sent % len(injection.corpus)]
    answer = "no answer"
    try:
        async with injection.connection() as wire, asyncio.timeout(_PATIENCE_S):
            # What is still being sent when the answer comes does not matter.
            sending = asyncio.ensure_future(wire.send(injection.corpus[name]))
            sending.add_done_callback(lambda done: done.cancelled() or done.exception())
            try:
                answer = await wire.status()
            finally:
                sending.cancel()
    except asyncio.IncompleteReadError:
        answer = "closed"
    except ConnectionResetError:
        answer = "reset"
    except TimeoutError:
        pass
    injection.cases[name] = answer
    return answer


async def _send_oversized(injection: _Injection) -> str:
    is_chunked = injection.chance.random() < 0.5
    more = "Transfer-Encoding: chunked\r\n" if is_chunked else ""
    head = http_request(injection.target, b"", length="" if is_chunked else str(OVERSIZED_BYTES), more=more)
    piece = b"%x\r\n%b\r\n" % (len(_PIECE), _PIECE) if is_chunked else _PIECE
    async with injection.connection() as wire:
        answering = asyncio.ensure_future(wire.status())
        try:
            await wire.send(head + b'{"prompt":"' * (not is_chunked))
            for _ in range(OVERSIZED_BYTES // len(_PIECE)):
                if answering.done():
                    break
                if injection.left_s <= 0:
                    return "cancelled"
                await wire.send(piece)
            async with asyncio.timeout(_PATIENCE_S):
                return await asyncio.shield(answering)
        except ConnectionError:
            # The answer may have come before the connection broke.
            return answering.result() if answering.done() and answering.exception() is None else "reset"
        finally:
            answering.cancel()
            answering.add_done_callback(lambda done: done.cancelled() or done.exception())


async def _flood_connections(injection: _Injection) -> str:
    hold_s = injection.chance.random() * 0.2
    async with injection.connection() as wire:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(hold_s, max(injection.left_s, 0.0))):
                return await wire.status()
    return "held"


_ONCE: dict[str, _Once] = {
    "cancel-storm": _cancel,
    "slow-readers": _read_slowly,
    "half-open": _hold_half_open,
    "malformed": _send_malformed,
    "oversized": _send_oversized,
    "connection-flood": _flood_connections,
}


async def _keep_probing(injection: _Injection, patience_s: float) -> list[float | None]:
    """To the fault's end. The last one is waited for: it may be the one that is hurt."""
    found: list[float | None] = []
    while injection.left_s > 0:
        await asyncio.sleep(min(_PROBE_GAP_S, injection.left_s))
        found.append(await _probe(injection.target, patience_s))
    return found


async def _probe_several(target: ServerAddress, patience_s: float) -> list[float | None]:
    """In a row, in no more time than the patience for one."""
    found: list[float | None] = []
    ends_at = time.monotonic() + patience_s
    while len(found) < _PROBES and (left_s := ends_at - time.monotonic()) > 0:
        found.append(await _probe(target, left_s))
    return found


async def _probe(target: ServerAddress, patience_s: float) -> float | None:
    """Seconds of one short request, or None when it is not answered as it should be."""
    content = (
        {"messages": [{"role": "user", "content": "Hello."}]} if target.endpoint == "chat" else {"prompt": "Hello."}
    )
    started_s = time.monotonic()
    try:
        body = {"model": target.model, **content, "max_tokens": 2} | target.extra
        page = await post(target, target.path, body, timeout_s=patience_s)
    except (OSError, TimeoutError):
        return None
    return time.monotonic() - started_s if page.status == 200 else None


async def _check_is_local(target: ServerAddress) -> None:
    authority = target.base.partition("://")[2].partition("/")[0]
    host, port = split_authority(authority, 80)
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        found = []
    addresses = {str(entry[4][0]).partition("%")[0] for entry in found}
    if not addresses or not all(ipaddress.ip_address(address).is_loopback for address in addresses):
        raise UsageError(
            f"Faults are for servers on this machine, and {host} is not here.",
            hint="If it is yours and not in use, allow it with --allow-remote.",
            code="remote_target",
            param="allow_remote",
        )
