"""The shipped board and alert rules are valid, and every metric that they name is shown by a gateway or a replica.

promtool, and Prometheus itself, try them where they are installed (Debian: prometheus).
"""

from __future__ import annotations

import contextlib
import json
import re
import runpy
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from gateways_for_tests import gateway_before
from prometheus_client.parser import text_string_to_metric_families
from requests_for_tests import finished

from powerband.gateway.observability.metrics import GatewayMetrics, GaugeSnapshot
from powerband.gateway.routes import ModelRoute
from powerband.gateway.snapshot import PoolSnapshot, ReplicaSnapshot
from powerband.metrics.prometheus import EngineMetrics
from powerband.mock_server.behavior import Behavior
from powerband.spec.slo import SLO

ROOT = Path(__file__).resolve().parents[2]
BOARDS = ROOT / "src/powerband/gateway/boards"
BOARD: dict[str, Any] = json.loads((BOARDS / "grafana.json").read_text())
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load((BOARDS / "alerts.yml").read_text())["groups"] for rule in group["rules"]
]
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
METRIC = re.compile(r"\b(?:powerband|gen_ai|vllm)[a-z0-9_:]*")
LABELS = re.compile(r"\{[^}]*\}|by \([^)]*\)")
needs_promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")
needs_prometheus = pytest.mark.skipif(not shutil.which("prometheus"), reason="prometheus is not installed")


def shown_names() -> set[str]:
    """Of all samples that a gateway shows that was just started, with one request over, and a replica."""
    gateway = GatewayMetrics()
    gateway.serve([ModelRoute(name="demo", rate=3.0, slo=SLO(ttft_s=0.5))])
    gateway.observe(finished())
    replica = ReplicaSnapshot(id="r1", state="ready")
    text = gateway.render(GaugeSnapshot(pools=(PoolSnapshot(model="demo", replicas=(replica,)),)))
    pages = text.decode(), EngineMetrics("demo").render().decode()
    return {
        sample.name for page in pages for family in text_string_to_metric_families(page) for sample in family.samples
    }


def board_queries() -> list[str]:
    return [target["expr"] for panel in PANELS for target in panel["targets"]]


def test_every_metric_that_they_name_is_shown() -> None:
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    variables = [one["query"]["query"] for one in BOARD["templating"]["list"] if one["type"] == "query"]
    queries = [*board_queries(), *variables, *(rule["expr"] for rule in RULES)]
    named = {name for query in queries for name in METRIC.findall(LABELS.sub("", query))}
    assert len(named) > 40
    assert named <= shown_names() | recorded


def test_the_board_is_what_its_script_writes() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "board.py"))
    assert (BOARDS / "grafana.json").read_text() == script["content"](), "run: python scripts/board.py"


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_every_panel_has_a_source_that_can_be_chosen_and_a_unit(panel: dict[str, Any]) -> None:
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
    assert panel["fieldConfig"]["defaults"]["unit"]


def test_panels_do_not_lie_on_each_other() -> None:
    places = [panel["gridPos"] for panel in BOARD["panels"]]
    cells = [
        (x, y) for at in places for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


def test_every_alert_says_how_bad_it_is_and_what_to_do() -> None:
    alerts = [rule for rule in RULES if "alert" in rule]
    assert len(alerts) > 12
    for alert in alerts:
        assert alert["labels"]["severity"] in ("page", "ticket"), alert["alert"]
        assert set(alert["annotations"]) == {"summary", "description"}, alert["alert"]


@needs_promtool
def test_promtool_takes_rules_configuration_and_every_query_of_the_board(tmp_path: Path) -> None:
    subprocess.run(["promtool", "check", "config", "prometheus.yml"], cwd=BOARDS, check=True, capture_output=True)
    filled = [
        query.replace("$__rate_interval", "1m").replace("$model", ".*").replace("$replica", ".*")
        for query in board_queries()
    ]
    rules = [{"record": f"panel:{number}", "expr": query} for number, query in enumerate(filled)]
    (tmp_path / "board.yml").write_text(yaml.safe_dump({"groups": [{"name": "board", "rules": rules}]}))
    subprocess.run(["promtool", "check", "rules", tmp_path / "board.yml"], check=True, capture_output=True)


@needs_promtool
def test_alerts_come_when_they_should_and_not_before(tmp_path: Path) -> None:
    """promtool plays series of one sample each 10 s: a service that keeps 97 % for half an hour, then 60 %."""
    kept = {
        'powerband_gateway_promised_attainment{model_name="demo"}': "0.95x240",
        'powerband_gateway_slo_requests_total{model_name="demo",kept="true"}': "0+97x180 17460+60x60",
        'powerband_gateway_slo_requests_total{model_name="demo",kept="false"}': "0+3x180 540+40x60",
    }
    test = {
        "interval": "10s",
        "input_series": [{"series": name, "values": values} for name, values in kept.items()],
        "alert_rule_test": [
            {"eval_time": "29m", "alertname": "PowerbandPromiseBurnsFast", "exp_alerts": []},
            {
                "eval_time": "35m",
                "alertname": "PowerbandPromiseBurnsFast",
                "exp_alerts": [
                    {
                        "exp_labels": {"severity": "page", "model_name": "demo"},
                        "exp_annotations": {
                            "summary": "demo: requests miss the SLO 8 times as often as promised",
                            "description": "Over 5 minutes and the last one. `powerband incidents` says why.",
                        },
                    }
                ],
            },
        ],
    }
    whole = {"rule_files": [str(BOARDS / "alerts.yml")], "evaluation_interval": "10s", "tests": [test]}
    (tmp_path / "tests.yml").write_text(yaml.safe_dump(whole))
    result = subprocess.run(
        ["promtool", "test", "rules", tmp_path / "tests.yml"], check=False, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


@needs_prometheus
def test_prometheus_finds_the_replicas_through_the_gateway(tmp_path: Path) -> None:
    with gateway_before(tmp_path, Behavior(), Behavior()) as gateway:
        for _ in range(5):
            gateway.post("/v1/completions", {"model": "scripted", "prompt": "hi", "max_tokens": 4}).raise_for_status()
        with prometheus_before(gateway.url, tmp_path) as server:
            wanted = {("powerband-gateway", "up"), ("powerband-replica", "up")}
            wait_for(lambda: {(one["labels"]["job"], one["health"]) for one in targets(server)} == wanted)
            assert len({one["labels"].get("replica") for one in targets(server)} - {None}) == 2
            wait_for(lambda: value(server, 'sum(powerband_gateway_requests_total{outcome="ok"})') == 5)
            groups = server.get("/api/v1/rules").json()["data"]["groups"]
            assert {rule["health"] for group in groups for rule in group["rules"]} <= {"ok", "unknown"}


@contextlib.contextmanager
def prometheus_before(url: str, folder: Path) -> Iterator[httpx.Client]:
    """Prometheus on a free port, as it is shipped but for the address and a shorter interval."""
    text = (BOARDS / "prometheus.yml").read_text().replace("127.0.0.1:8080", url.removeprefix("http://"))
    text = text.replace("interval: 5s", "interval: 1s").replace("refresh_interval: 10s", "refresh_interval: 1s")
    (folder / "prometheus.yml").write_text(text)
    shutil.copy(BOARDS / "alerts.yml", folder)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with (folder / "prometheus.log").open("w") as output:
        process = subprocess.Popen(
            [
                "prometheus",
                "--config.file=prometheus.yml",
                "--storage.tsdb.path=data",
                f"--web.listen-address={address}",
            ],
            cwd=folder,
            stdout=output,
            stderr=output,
        )
    try:
        with httpx.Client(base_url=f"http://{address}", trust_env=False) as client:
            wait_for(lambda: is_ready(client))
            yield client
    finally:
        process.kill()
        process.wait()


def is_ready(server: httpx.Client) -> bool:
    try:
        return server.get("/-/ready").status_code == 200
    except httpx.TransportError:
        return False


def targets(server: httpx.Client) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = server.get("/api/v1/targets").json()["data"]["activeTargets"]
    return found


def value(server: httpx.Client, query: str) -> float | None:
    result = server.get("/api/v1/query", params={"query": query}).json()["data"]["result"]
    return float(result[0]["value"][1]) if result else None


def wait_for(condition: Any, timeout_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come to pass"
        time.sleep(0.1)
