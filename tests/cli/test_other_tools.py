"""The command lines of vLLM's and GuideLLM's benchmarks mean the same here."""

from __future__ import annotations

import math
import shlex
from typing import Any

import pytest

from powerband.bench.client.probe import parse_endpoint
from powerband.cli.bench import bench as bench_module
from powerband.cli.main import main
from powerband.errors import UsageError
from powerband.spec.workload.arrivals import MAX_RATE, ClosedLoop, OpenLoop
from powerband.spec.workload.lengths import Fixed, Uniform
from powerband.spec.workload.workload import RequestMix


@pytest.fixture
def experiment(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function from a command line to the experiment that it means, and its modes."""

    found: list[Any] = []

    def run(modes: Any, _output: Any, target: Any, load: Any, requests: Any, server: Any, judging: Any) -> int:
        found.append((bench_module._experiment(modes, None, target, load, requests, server, judging), modes))
        return 0

    monkeypatch.setattr(bench_module, "_run", run)

    def meant(line: str) -> Any:
        assert main(shlex.split(line)[1:]) == 0
        return found[-1]

    return meant


def test_vllm_bench_serve(experiment: Any) -> None:
    found, _ = experiment(
        "powerband bench serve --backend openai-chat --model Qwen/Qwen3-0.6B --endpoint /v1/chat/completions "
        "--base-url http://10.0.0.7:8001 --dataset-name random --random-input-len 800 --random-output-len 90 "
        "--num-prompts 200 --request-rate 10 --ignore-eos --save-result --seed 3 --goodput ttft:500 tpot:50"
    )
    assert found.target.base == "http://10.0.0.7:8001"
    assert (found.target.endpoint, found.target.model, found.target.ignore_eos) == ("chat", "Qwen/Qwen3-0.6B", True)
    assert found.workload.requests == RequestMix(Fixed(800), Fixed(90))
    assert found.workload.arrivals == OpenLoop.at(10.0)
    assert (found.num_requests, found.seed, found.duration_s) == (200, 3, math.inf)
    assert found.slo.limits == {"ttft": 0.5, "tpot": 0.05}


def test_vllm_sends_all_at_once_unless_a_rate_is_given(experiment: Any) -> None:
    found, _ = experiment("powerband bench --host 127.0.0.1 --port 9000 --dataset-name random")
    assert found.target.base == "http://127.0.0.1:9000"
    assert found.target.endpoint == "completions"
    assert found.workload.requests == RequestMix(Fixed(1024), Fixed(128))
    assert found.workload.arrivals == OpenLoop.at(MAX_RATE)
    assert found.num_requests == 1000


def test_vllms_most_concurrent_requests_at_an_infinite_rate_are_a_closed_loop(experiment: Any) -> None:
    found, _ = experiment(
        "powerband bench --backend vllm --dataset-name random --random-range-ratio 0.2 --random-input-len 1000 "
        "--request-rate inf --max-concurrency 16"
    )
    assert found.workload.arrivals == ClosedLoop(16)
    assert found.workload.requests == RequestMix(Uniform(800, 1200), Uniform(102, 154))


@pytest.mark.parametrize(
    ("profile", "arrivals"),
    [
        ("--rate-type constant --rate 5", OpenLoop.at(5.0, math.inf)),
        ("--profile poisson --rate 5", OpenLoop.at(5.0)),
        ("--profile concurrent --rate 8", ClosedLoop(8)),
        ("--profile synchronous", ClosedLoop(1)),
        ("--profile throughput", OpenLoop.at(MAX_RATE)),
    ],
)
def test_guidellm_benchmark(profile: str, arrivals: object, experiment: Any) -> None:
    found, _ = experiment(
        f"powerband bench benchmark --target http://10.0.0.7:8001 {profile} --max-seconds 30 --backend openai_http "
        "--request-type chat_completions --data prompt_tokens=256,output_tokens=128"
    )
    assert found.target.base == "http://10.0.0.7:8001"
    assert found.target.endpoint == "chat"
    assert found.workload.arrivals == arrivals
    assert found.workload.requests == RequestMix(Fixed(256), Fixed(128))
    assert found.duration_s == 30


def test_guidellms_sweep_is_a_sweep(experiment: Any) -> None:
    _, modes = experiment("powerband bench --target localhost:8000 --profile sweep --max-requests 50")
    assert modes.sweep


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--backend openai-chat --endpoint /v1/completions", "contradict each other"),
        ("--backend tgi", "Unknown backend 'tgi'"),
        ("--dataset-name sharegpt", "--dataset-name sharegpt needs --dataset-path."),
        ("--dataset-name random --workload rag", "--workload and another tool's data contradict each other."),
        ("--random-range-ratio 0.5", "--random-range-ratio needs --dataset-name random."),
        ("--data prompt_tokens=5", "data is 'prompt_tokens=5'."),
        ("--profile constant", "--profile constant needs a --rate."),
        ("--profile sweep --rate 3", "--profile sweep has no --rate."),
        ("--goodput ttft:500 --slo tpot=5ms", "--goodput and --slo contradict each other."),
        ("--ignore-eos --respect-eos", "--ignore-eos and --respect-eos contradict each other."),
        ("localhost:8000 --port 8001", "The server is named twice."),
        ("--rate 5 --max-concurrency 4", "--rate and --concurrency contradict each other."),
    ],
)
def test_what_contradicts_is_refused(options: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *shlex.split(options)]) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("endpoint", "backend", "found"),
    [
        (None, None, "completions"),
        ("/v1/chat/completions", "openai-chat", "chat"),
        ("/v1/chat/completions", "vllm", "chat"),
        ("/v1/completions", "openai", "completions"),
        (None, "openai-chat", "chat"),
        (None, "openai_http", "completions"),
    ],
)
def test_an_endpoint_may_be_a_path_beside_a_backend(endpoint: str | None, backend: str | None, found: str) -> None:
    assert parse_endpoint(endpoint, backend) == found


def test_an_unknown_endpoint_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match="Unknown endpoint 'responses'"):
        parse_endpoint("responses")
