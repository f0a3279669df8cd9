"""One process of the load generator: it sends its chains at their times, and reports every request.

    python -m powerband.bench.client.worker      a Job and a Go on stdin, messages on stdout

Each message is four bytes of length, then msgpack.

A chain's next request is due when its schedule says, or so long after the answer before it. Due times are absolute: a
client that falls behind catches up, and its delay is reported (send lag).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import resource
import sys
import time
from dataclasses import dataclass

import msgspec

from powerband.bench.client.answer_forms import is_valid
from powerband.bench.client.messages import (
    FILE_LIMIT,
    IN_FLIGHT,
    PORT_LIMIT,
    STOP,
    ChainMessage,
    FromWorker,
    RequestMessage,
    Sample,
    StartSignal,
    WorkerDone,
    WorkerFailure,
    WorkerJob,
    WorkerProgress,
    WorkerReady,
)
from powerband.bench.client.precise_timer import PreciseTimer
from powerband.bench.client.prompts import ConversationPrompts, PromptMaker, request_bytes
from powerband.bench.client.responses import MAX_RESPONSE_BYTES, ParsedResponse, parse_response
from powerband.http_client.connection import CollectedResponse, ConnectionPool
from powerband.http_client.problems import connection_problem
from powerband.metrics.record import Outcome

_MAX_SAMPLES = 500  # in one message
REFUSED = (429, 503)
_CLIENT_LIMITS = {errno.EMFILE: FILE_LIMIT, errno.ENFILE: FILE_LIMIT, errno.EADDRNOTAVAIL: PORT_LIMIT}


@dataclass(slots=True)
class _OpenRequest:
    """A request that was sent and has not ended."""

    planned: RequestMessage
    chain: int
    due_s: float
    sent_s: float
    response: CollectedResponse | None = None


class LoadWorker:
    """Runs one Job. Call `run` once; `stop` ends it early."""

    def __init__(self, job: WorkerJob, start_at: float) -> None:
        self._job, self._start_at = job, start_at
        self._idle_cpu_s = _cpu_s()
        self._deadlines = PreciseTimer()
        self._connections = ConnectionPool(job.target.base, insecure=job.target.insecure)
        self._maker = PromptMaker(job.target.words_per_token, job.target.salt)
        self._samples: list[Sample] = []
        self._open: dict[int, _OpenRequest] = {}  # by index
        self._tasks: set[asyncio.Task[None]] = set()
        self._defect: BaseException | None = None
        self._sent = self._running = self._chunks = self._unsent = self._ended = 0
        self._stopped_s: float | None = None

    async def run(self, send: MessageWriter) -> None:
        """Until every request is answered, has failed, or is given up on."""
        reporting = asyncio.create_task(self._report(send))
        self._sending = asyncio.create_task(self._send_chains())
        await asyncio.wait({self._sending})
        if not self._sending.cancelled():
            self._sending.result()
        await self._drain()
        reporting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reporting
        self._connections.close()
        self._deadlines.close()
        while len(self._samples) > _MAX_SAMPLES:
            await send(self._progress())
        await send(WorkerDone(progress=self._progress(), unsent=self._unsent))

    def stop(self) -> None:
        """Send nothing more, and report what is in flight as aborted."""
        self._stopped_s = self._now_s()
        self._sending.cancel()
        for task in self._tasks:
            task.cancel()

    async def _send_chains(self) -> None:
        """Start them one after the other as they are due, so that the loop is not full of sleepers."""
        job = self._job
        for position, chain in enumerate(job.chains):
            talk = ConversationPrompts(job.target, self._maker)
            ready = request_bytes(job.target, talk.body(chain.requests[0]))
            if chain.start_s > job.end_s:
                self._unsent += sum(len(late.requests) for late in job.chains[position:])
                break
            await self._until(chain.start_s)
            task = asyncio.create_task(self._run_chain(chain, talk, ready))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            task.add_done_callback(self._record_defect)
            await asyncio.sleep(0)  # it is sent before the next is made ready

    async def _drain(self) -> None:
        left_s = self._job.end_s + self._job.drain_s - self._now_s()
        if self._tasks:
            _, late = await asyncio.wait(set(self._tasks), timeout=max(left_s, 0.0))
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        if self._defect is not None:
            raise self._defect
        for unended in list(self._open.values()):
            if self._stopped_s is None:
                self._keep(unended, None, Outcome.TIMED_OUT, "not answered when the run ended")
            else:
                answer = unended.response
                reading = parse_response(answer) if answer is not None and answer.status == 200 else None
                self._keep(unended, reading, Outcome.ABORTED, IN_FLIGHT)
                await asyncio.sleep(0)  # there may be thousands: progress is reported meanwhile
        if self._stopped_s is not None:
            self._unsent = sum(len(chain.requests) for chain in self._job.chains) - self._ended

    def _record_defect(self, task: asyncio.Task[None]) -> None:
        """What no request can cause is an error in here, and ends the run: without its chain the figures would lie."""
        if not task.cancelled() and self._defect is None:
            self._defect = task.exception()

    async def _run_chain(self, chain: ChainMessage, talk: ConversationPrompts, ready: bytes) -> None:
        due_s, is_lost = chain.start_s, False
        for position, planned in enumerate(chain.requests):
            is_lost = is_lost and planned.turn > 0  # a conversation that lost an answer cannot go on
            if is_lost:
                self._unsent += 1
                continue
            due_s = (self._now_s() if position else due_s) + planned.think_s
            if due_s > self._job.end_s:
                self._unsent += len(chain.requests) - position
                return
            if position:
                ready = request_bytes(self._job.target, talk.body(planned))
            if planned.think_s:
                await self._until(due_s)
            reading = await self._run_request(planned, chain.number, due_s, ready)
            if reading is None or reading.problem:
                is_lost = True
            else:
                talk.answered(reading.text, reading.prompt_tokens and reading.prompt_tokens + reading.output_tokens)

    async def _run_request(
        self, planned: RequestMessage, chain: int, due_s: float, ready: bytes
    ) -> ParsedResponse | None:
        """Send it and wait for the answer. None: there was none."""
        self._open[planned.index] = request = _OpenRequest(planned, chain, due_s, self._now_s())
        self._sent += 1
        self._running += 1
        try:
            async with asyncio.timeout_at(self._start_at + due_s + self._job.timeout_s):
                answer = await self._exchange(ready, request)
            reading = parse_response(answer)
            self._chunks += len(answer.pieces)
            outcome = Outcome.OK
            if reading.problem:
                outcome = Outcome.REFUSED if answer.status in REFUSED else Outcome.ERROR
            self._keep(request, reading, outcome, reading.problem, answer.status)
            return reading
        except TimeoutError:
            self._keep(request, None, Outcome.TIMED_OUT, f"not answered within {self._job.timeout_s:g} s")
        except OSError as problem:
            error = _CLIENT_LIMITS.get(problem.errno or 0, f"no connection: {connection_problem(problem)}")
            self._keep(request, None, Outcome.ERROR, error)
        finally:
            self._running -= 1
        return None

    async def _exchange(self, ready: bytes, request: _OpenRequest) -> CollectedResponse:
        """A kept connection may be closed just then: what got no answer at all is sent once more on a new one."""
        while True:
            connection, was_used = await self._connections.take()
            request.response = response = CollectedResponse(MAX_RESPONSE_BYTES)
            await connection.exchange((ready,), response)
            if response.code and was_used and not response.received_s:
                continue
            return response

    def _keep(
        self, request: _OpenRequest, reading: ParsedResponse | None, outcome: Outcome, error: str, status: int = 0
    ) -> None:
        planned = request.planned
        self._open.pop(planned.index, None)
        self._ended += 1
        reading = reading or ParsedResponse()
        self._samples.append(
            Sample(
                index=planned.index,
                chain=request.chain,
                turn=planned.turn,
                scheduled_s=request.due_s,
                sent_s=request.sent_s,
                chunk_times_s=tuple(time_s - self._start_at for time_s in reading.times_s),
                chunk_tokens=tuple(reading.tokens),
                outcome=outcome,
                status=status,
                error=error,
                finish_reason=reading.finish_reason,
                asked_tokens=planned.output_tokens,
                prompt_tokens=reading.prompt_tokens,
                output_tokens=reading.output_tokens,
                cached_tokens=reading.cached_tokens,
                is_valid=self._is_valid(reading) if outcome is Outcome.OK else None,
                counted_by="usage" if reading.counted_by_usage else "chunks",
                ended_s=self._stopped_s if outcome is Outcome.ABORTED else None,
            )
        )

    def _is_valid(self, reading: ParsedResponse) -> bool | None:
        return is_valid(self._job.target.form, reading.content, list(reading.calls.values()))

    async def _report(self, send: MessageWriter) -> None:
        while True:
            await asyncio.sleep(self._job.progress_s)
            await send(self._progress())

    def _progress(self) -> WorkerProgress:
        samples, self._samples = self._samples[:_MAX_SAMPLES], self._samples[_MAX_SAMPLES:]
        in_flight = sum(len(one.response.pieces) for one in self._open.values() if one.response is not None)
        return WorkerProgress(
            sent=self._sent,
            running=self._running,
            samples=tuple(samples),
            chunks=self._chunks + in_flight,
            chunks_in_flight=in_flight,
            cpu_s=_cpu_s() - self._idle_cpu_s,
        )

    def _now_s(self) -> float:
        return time.monotonic() - self._start_at

    async def _until(self, due_s: float) -> None:
        await self._deadlines.until(self._start_at + due_s)


class MessageWriter:
    """Messages on stdout. A coordinator that has gone away ends the process."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer

    async def __call__(self, message: FromWorker) -> None:
        data = msgspec.msgpack.encode(message)
        self._writer.write(len(data).to_bytes(4, "big") + data)
        await self._writer.drain()


def _cpu_s() -> float:
    """This process has used so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def read_message(reader: asyncio.StreamReader) -> bytes:
    """Raises asyncio.IncompleteReadError at the end."""
    return await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big"))


async def _main() -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, sys.stdout)
    transport.set_write_buffer_limits(0)  # what is drained is gone: nothing is left behind when this process ends
    send = MessageWriter(asyncio.StreamWriter(transport, protocol, None, loop))
    job = msgspec.msgpack.decode(await read_message(reader), type=WorkerJob)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # of open files, of which each connection is one
    with contextlib.suppress(OSError):
        os.nice(-10)  # where it may: it needs little, and that at once
    # What a run makes is kept until its end: a collector would find little, and stop the clock while it looks.
    gc.freeze()
    gc.set_threshold(200_000, 50, 100)
    await send(WorkerReady())
    go = msgspec.msgpack.decode(await read_message(reader), type=StartSignal)
    try:
        worker = LoadWorker(job, go.start_at)
        work = asyncio.create_task(worker.run(send))
        last = asyncio.create_task(reader.read(1))  # STOP, or nothing: the coordinator is gone
        await asyncio.wait({work, last}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done() and last.result() == STOP:
            worker.stop()
            await work
        if work.done():
            work.result()
    except Exception as problem:
        await send(WorkerFailure(f"{type(problem).__name__}: {problem}"))


if __name__ == "__main__":
    import uvloop

    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(_main())
