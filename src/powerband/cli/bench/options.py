"""The flags of `powerband bench`: those of the load are made of spec.workload.options."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

from cyclopts import Group, Parameter

from powerband.cli.flags import add_flags
from powerband.cli.load_options import REQUESTS, MixOptions
from powerband.errors import UsageError
from powerband.spec.quantities import share
from powerband.spec.slo import SLO
from powerband.spec.workload.options import option


def _flag(group: Group, *names: str, help: str) -> Parameter:
    return Parameter(name=names, help=help, group=group, negative="", show_default=False)


_target = partial(_flag, Group("Server", sort_key=3))
_judging = partial(_flag, Group("SLO", sort_key=4))


@dataclass(frozen=True, kw_only=True)
class RequestOptions(MixOptions):
    respect_eos: bool = option(False, "Let the model end its answers; default: always the requested length")


add_flags(RequestOptions, REQUESTS)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class TargetFlags:
    model: Annotated[str | None, _target("--model", help="Name in the API; default: the server's first")] = None
    endpoint: Annotated[
        str | None,
        _target("--endpoint", "--request-type", help="completions (default) or chat; or a path, /v1/chat/completions"),
    ] = None
    backend: Annotated[
        str | None, _target("--backend", "--backend-type", help="The same, as vLLM names it: openai, vllm, openai-chat")
    ] = None
    api_key: Annotated[str | None, _target("--api-key", help="Default: $POWERBAND_API_KEY, $OPENAI_API_KEY")] = None
    max_model_len: Annotated[
        int | None, _target("--max-model-len", help="Cut requests to this context; default: what the server lists")
    ] = None
    header: Annotated[
        list[str] | None, _target("--header", help="'Name: value', sent with every request; may be repeated")
    ] = None
    extra_body: Annotated[str | None, _target("--extra-body", help="JSON object, merged into every request's body")] = (
        None
    )
    insecure: Annotated[bool, _target("--insecure", help="Do not check the certificate")] = False
    wait: Annotated[str, _target("--wait", help="How long to wait for a server that is starting")] = "0s"
    timeout: Annotated[str, _target("--timeout", help="Per request; default: 600s")] = "600s"
    workers: Annotated[int, _target("--workers", help="Client processes; default: 1")] = 1
    metrics_url: Annotated[
        str | None, _target("--metrics-url", help="Default: /metrics of the server; 'none': do not scrape")
    ] = None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class SLOFlags:
    slo: Annotated[
        str | None,
        _judging("--slo", help="Limits: ttft=500ms,tpot=50ms; also stall and e2e"),
    ] = None
    attainment: Annotated[
        str | None, _judging("--attainment", help="Fraction of requests that must meet it; default: 95%")
    ] = None
    warm_up: Annotated[str, _judging("--warm-up", help="Fraction left out at the start; default: 10%")] = "10%"
    cool_down: Annotated[str, _judging("--cool-down", help="Fraction left out at the end; default: 5%")] = "5%"

    def made(self) -> SLO | None:
        """Raises UsageError."""
        if self.slo is None:
            if self.attainment is not None:
                raise UsageError("--attainment has no effect without --slo.", param="attainment")
            return None
        slo = SLO.parse(self.slo)
        return slo if self.attainment is None else replace(slo, attainment=share(self.attainment, param="attainment"))

    def shares(self) -> tuple[float, float]:
        """Of warm-up and cool-down. Raises UsageError."""
        found = [share(text, param=name) if text.strip("0%. ") else 0.0 for name, text in self._texts().items()]
        if sum(found) >= 1:
            raise UsageError("Warm-up and cool-down leave nothing to measure.", param="warm_up")
        return found[0], found[1]

    def _texts(self) -> dict[str, str]:
        return {"warm-up": self.warm_up, "cool-down": self.cool_down}
