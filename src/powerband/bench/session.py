"""One call of `powerband bench`: look at the server, load it once or several times, and make a report of it."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field, replace

import msgspec

from powerband.bench.client.accepted_fields import find_accepted_fields, rejected_text
from powerband.bench.client.http import get
from powerband.bench.client.messages import ServerAddress
from powerband.bench.client.probe import ServerInfo, calibrate_prompt_words, find_server
from powerband.bench.load import Live, LoadOptions, LoadResult, run_load, steady_window
from powerband.bench.report.results import (
    ClientMachine,
    FoundRate,
    OfferedLoad,
    Point,
    ReportedAddress,
    RunReport,
    build_point,
    powerband_version,
    utc_now,
)
from powerband.bench.saturation import is_saturated
from powerband.bench.search import CapacityResult, Searcher, Trial
from powerband.engines.metrics import parse_metrics
from powerband.errors import EnvironmentFault
from powerband.metrics.record import Outcome
from powerband.spec.slo import SLO
from powerband.spec.workload.arrivals import ClosedLoop, OpenLoop
from powerband.spec.workload.fitting import refuse_cuts
from powerband.spec.workload.workload import Workload

SWEEP = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0, 1.15)  # of the throughput under a full closed loop
_FULL_LOAD = 64  # users, to see what a server can do at most
_IDLE_WAIT_S = 10.0
_BEGINNING = 3  # requests, to see how long one takes alone


class _Interrupted(Exception):
    """The user ended the run; what was measured has been kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """What to send where, and how it is judged."""

    target: ServerAddress
    workload: Workload
    duration_s: float = math.inf
    num_requests: int | None = None
    seed: int = 0
    slo: SLO | None = None
    warm_up: float = 0.1  # fraction left out at the start, see load.steady_window
    cool_down: float = 0.05  # fraction left out at the end
    options: LoadOptions = field(default_factory=LoadOptions)
    ceiling_chunks_per_s: float | None = None  # capacity of this machine's client; None: not calibrated
    max_model_len: int | None = None  # requests are cut to this context; None: to that of the server
    strict_lengths: bool = False  # UsageError where requests would be cut

    def at_rate(self, rate: float) -> Experiment:
        """The same requests, open loop, at this rate."""
        arrivals = self.workload.arrivals
        burstiness = arrivals.burstiness if isinstance(arrivals, OpenLoop) else 1.0
        return replace(self, workload=replace(self.workload, arrivals=OpenLoop.at(rate, burstiness)))

    def at_concurrency(self, users: int) -> Experiment:
        return replace(self, workload=replace(self.workload, arrivals=ClosedLoop(users)))


class BenchSession:
    """Call `open` first, then one of `single`, `sweep` and `find_rate`. `loads` are those of the report's points.

    watch: called several times a second with the load that runs. on_point: called with each point as it ends.
    on_note: called with a sentence about what is sent otherwise than asked: requests that were cut, rejected fields.
    """

    def __init__(
        self,
        experiment: Experiment,
        *,
        command: Sequence[str] = (),
        watch: Callable[[Live], object] | None = None,
        on_point: Callable[[Point], object] | None = None,
        on_note: Callable[[str], object] = lambda _sentence: None,
    ) -> None:
        self._experiment, self._command = experiment, tuple(command)
        self._on_note, self._is_cut_noted = on_note, False
        self._watch, self._on_point = watch, on_point or (lambda _point: None)
        self._server: ServerInfo | None = None
        self._started_at = utc_now()
        self._points: list[Point] = []
        self._is_interrupted = False
        self.loads: list[LoadResult] = []

    def interrupt(self) -> None:
        """End the running load and the run: its report has what was measured until then."""
        self._is_interrupted = True

    async def open(self, wait_s: float = 0.0) -> ServerInfo:
        """Find the server, its model and its context. Raises as probe.find_server and probe.calibrate_prompt_words."""
        experiment = self._experiment
        target, self._server = await find_server(experiment.target, wait_s)
        known = [length for length in (experiment.max_model_len, self._server.max_model_len) if length is not None]
        target = msgspec.structs.replace(target, max_model_len=min(known, default=None))
        with contextlib.suppress(OSError, TimeoutError):  # a server that is not ready is the next probe's to report
            target = await find_accepted_fields(target)
        if target.max_model_len is None:
            self._on_note(
                f"{target.base} does not list the context of {target.model} (max_model_len), so no request is cut to "
                "fit it. --max-model-len names it."
            )
        if target.rejected_fields:
            self._on_note(f"{rejected_text(target)}.")
        self._experiment = replace(
            experiment,
            target=await calibrate_prompt_words(target),
            workload=experiment.workload.within(target.max_model_len),
        )
        return self._server

    async def single(self) -> RunReport:
        """One load, as it was asked for."""
        return await self._reported(self._single())

    async def _single(self) -> None:
        result, arrivals = await self._load(self._experiment), self._experiment.workload.arrivals
        rates = {r for p in arrivals.phases for r in (p.start, p.end)} if isinstance(arrivals, OpenLoop) else set()
        self._keep(result, "run", OfferedLoad.of(arrivals, result.schedule), is_steady=len(rates) == 1)

    async def sweep(self, rates: Sequence[float] = ()) -> RunReport:
        """Without `rates`: from a tenth of what the server can do to a little beyond it."""
        return await self._reported(self._sweep(rates))

    async def _sweep(self, rates: Sequence[float]) -> None:
        if not rates:
            max_rate = await self._max_rate()
            rates = [max_rate * share for share in SWEEP]
        for rate in sorted(rates):
            experiment = self._experiment.at_rate(rate)
            self._keep(await self._load(experiment), f"{rate:.3g}/s", OfferedLoad("rate", rate))

    async def find_rate(self, first: float | None = None) -> RunReport:
        """The highest rate that keeps the SLO. first: where to begin; default: what one user alone would reach.

        Raises UsageError as Searcher does.
        """
        experiment = self._experiment
        searcher = Searcher(
            self._run_trial,
            experiment.slo or SLO(),
            seed=experiment.seed,
            warm_up=experiment.warm_up,
            cool_down=experiment.cool_down,
            shown=self._keep_trial,
        )

        async def search() -> FoundRate:
            return _found_rate(await searcher.find_rate(first or await self._single_user_rate()))

        return await self._reported(search())

    async def _reported(self, run: Coroutine[None, None, FoundRate | None]) -> RunReport:
        try:
            return self._report(await run)
        except _Interrupted:
            return self._report()

    async def _run_trial(self, rate: float, seed: int, stop: Callable[[Live], bool] | None) -> LoadResult:
        return await self._load(replace(self._experiment.at_rate(rate), seed=seed), stop)

    def _keep_trial(self, trial: Trial) -> None:
        label = f"{trial.rate:.3g}/s" + (f", seed {trial.seed}" if trial.seed != self._experiment.seed else "")
        self._keep(trial.result, label, OfferedLoad("rate", trial.rate))

    async def _single_user_rate(self) -> float:
        """Requests a second of one user who does not wait. Raises EnvironmentFault when none is answered."""
        result = await self._load(replace(self._experiment.at_concurrency(1), num_requests=_BEGINNING))
        return self._rate_of(result)

    async def _max_rate(self) -> float:
        """Requests a second of many users who do not wait."""
        experiment = self._experiment.at_concurrency(_FULL_LOAD)
        result = await self._load(replace(experiment, duration_s=min(experiment.duration_s, 30.0)))
        return self._rate_of(result)

    def _rate_of(self, result: LoadResult) -> float:
        if self._is_interrupted:
            raise _Interrupted
        answered = [sample for sample in result.samples if sample.outcome is Outcome.OK and sample.chunk_times_s]
        if not answered:
            why = next((sample.error for sample in result.samples if sample.error), "no request was answered")
            raise EnvironmentFault(f"{self._experiment.target.base} answers no request: {why}.", code="no_answer")
        return len(answered) / max(sample.chunk_times_s[-1] for sample in answered)

    async def _load(self, experiment: Experiment, stop: Callable[[Live], bool] | None = None) -> LoadResult:
        schedule = experiment.workload.draw(
            experiment.seed, duration_s=experiment.duration_s, num_requests=experiment.num_requests
        )
        if experiment.strict_lengths:
            refuse_cuts(schedule.cut, schedule.num_requests)
        if schedule.cut is not None and not self._is_cut_noted:
            self._on_note(schedule.cut_text)
            self._is_cut_noted = True  # other loads of a session send the like
        if self._points:
            await self._idle()
        if self._is_interrupted:
            raise _Interrupted
        # New texts for each load: a prefix cache that knew them from the one before would make the server look faster.
        target = msgspec.structs.replace(experiment.target, salt=f"{time.time_ns()} ")

        def ends(live: Live) -> bool:
            return self._is_interrupted or (stop is not None and stop(live))

        result = await run_load(target, schedule, experiment.options, watch=self._watch, stop=ends)
        return replace(result, interrupted=True) if self._is_interrupted and result.stopped else result

    async def _idle(self) -> None:
        """Until the server says that nothing runs any more, or says nothing, or a while has gone by: what an aborted
        load left behind must not burden the next.
        """
        until_s = time.monotonic() + _IDLE_WAIT_S
        while time.monotonic() < until_s:
            try:
                page = await get(self._experiment.target, self._experiment.options.metrics_url or "/metrics")
                seen = parse_metrics(page.body) if page.status == 200 else {}
            except (OSError, ValueError, TimeoutError):
                return
            if not seen.get("running", 0.0) + seen.get("waiting", 0.0):
                return
            await asyncio.sleep(0.2)

    def _keep(self, result: LoadResult, label: str, offered: OfferedLoad, *, is_steady: bool = True) -> None:
        """is_steady: at one rate, so that a queue that grows is no growth of the load."""
        experiment = self._experiment
        window = steady_window(result.samples, experiment.warm_up, experiment.cool_down)
        point = build_point(
            result,
            label=label,
            offered=offered,
            warm_up=experiment.warm_up,
            cool_down=experiment.cool_down,
            slo=experiment.slo,
            ceiling_chunks_per_s=experiment.ceiling_chunks_per_s,
            saturated=is_steady and is_saturated([sample.record() for sample in result.samples], window),
        )
        self._points.append(point)
        self.loads.append(result)
        self._on_point(point)
        if self._is_interrupted:
            raise _Interrupted

    def _report(self, found: FoundRate | None = None) -> RunReport:
        experiment = self._experiment
        return RunReport(
            started_at=self._started_at,
            command=self._command,
            powerband=powerband_version(),
            machine=ClientMachine.here(),
            target=ReportedAddress.of(experiment.target),
            server=self._server or ServerInfo("unknown", "", None),
            workload=experiment.workload.as_dict(),
            slo=experiment.slo,
            seed=experiment.seed,
            warm_up=experiment.warm_up,
            cool_down=experiment.cool_down,
            points=tuple(self._points),
            found=found,
            interrupted=self._is_interrupted,
        )


@contextlib.contextmanager
def interrupted_by_signals(session: BenchSession) -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM interrupt the session, and are listed; a second one ends the process as usual."""
    loop, received = asyncio.get_running_loop(), list[int]()

    def interrupt(number: signal.Signals) -> None:
        received.append(number)
        session.interrupt()
        restore()

    def restore() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt, number)
    try:
        yield received
    finally:
        restore()


def _found_rate(found: CapacityResult) -> FoundRate:
    low, high = found.interval
    return FoundRate(found.rate, (low, None if math.isinf(high) else high), found.attainment, found.attainment_interval)
