"""A real Prometheus beside a real server: every query of the dashboard and every rule returns data."""

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from grafana import render
from harness import Server
from openai import BadRequestError
from PIL import Image
from shared import noise, program

DEPLOY = Path(__file__).parents[2] / "deploy"
RECORDED = ["items:rate5m", "tokens_saved:rate5m", "kept:ratio5m", "spectrum_seconds:p95_5m"]


class Prometheus:
    def __init__(self, folder: Path, target: str) -> None:
        shutil.copy(DEPLOY / "prometheus/rules.yml", folder)
        config = (DEPLOY / "prometheus/prometheus.yml").read_text()
        for shipped, here in (
            ("server:8000", target),
            ("/etc/prometheus/rules.yml", str(folder / "rules.yml")),
            ("scrape_interval: 5s", "scrape_interval: 1s"),
            ("evaluation_interval: 15s", "evaluation_interval: 1s"),
        ):
            assert shipped in config
            config = config.replace(shipped, here)
        (folder / "prometheus.yml").write_text(config)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self.url = f"http://{address}"
        flags = [f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
        with (folder / "log").open("w") as log:
            self.process = subprocess.Popen(
                [program("prometheus"), *flags, f"--web.listen-address={address}"], stdout=log, stderr=log
            )

    def get(self, path: str, **params: Any) -> Any:
        response = httpx.get(f"{self.url}/api/v1/{path}", params=params, timeout=30)
        assert response.status_code == 200, response.text
        return response.json()["data"]

    def values(self, expr: str, seconds: float) -> list[float]:
        """All values that a query had in the last seconds."""
        now = time.time()
        data = self.get("query_range", query=expr, start=now - seconds, end=now, step=1)
        assert data["resultType"] == "matrix"
        return [float(value) for series in data["result"] for _, value in series["values"]]


@pytest.fixture(scope="module")
def prometheus(
    pruning: Server, images: dict[str, Image.Image], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    """Has watched a server for half a minute of traffic."""
    prometheus = Prometheus(tmp_path_factory.mktemp("prometheus"), pruning.url.removeprefix("http://"))
    try:
        end = time.monotonic() + 30
        number = 0
        while time.monotonic() < end:
            pruning.ask(images["coffee"], noise(number), "What is it?", max_tokens=16)
            pruning.ask(images["flat"])
            with pytest.raises(BadRequestError):
                pruning.ask(images["flat"], options={"energy": 2})
            number += 1
        yield prometheus
    finally:
        prometheus.process.terminate()
        prometheus.process.wait()


def test_the_server_is_scraped(prometheus: Prometheus) -> None:
    (target,) = prometheus.get("targets")["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", "")


@pytest.mark.parametrize(
    ("title", "expr"),
    [(panel["title"], expr) for panel in render.panels() for expr, _ in render.expressions(panel, "10s")],
)
def test_each_query_of_the_board_returns_data(prometheus: Prometheus, title: str, expr: str) -> None:
    values = [value for value in prometheus.values(expr, seconds=25) if value == value]
    assert values, f"{title}: {expr}"
    assert min(values) >= 0
    if not title.startswith(
        ("Preemptions", "Load level", "Thresholds lowered", "Requests", "KV cache in use", "Budgets")
    ):
        assert max(values) > 0, f"{title}: {expr}"


def test_every_rule_is_evaluated(prometheus: Prometheus) -> None:
    groups = prometheus.get("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert [(rule["name"], rule.get("lastError", "")) for rule in rules if rule["health"] != "ok"] == []
    assert len(rules) == 4 + 7


@pytest.mark.parametrize("name", RECORDED)
def test_what_rules_record_is_data(prometheus: Prometheus, name: str) -> None:
    values = prometheus.values(f"model:eadaprune_{name}", seconds=20)
    assert values
    assert min(values) > 0


def test_alerts_see_the_server(prometheus: Prometheus) -> None:
    """A third of the requests of this test are refused, which is what an alert is for; nothing else is wrong."""
    alerts = {alert["labels"]["alertname"]: alert["labels"] for alert in prometheus.get("alerts")["alerts"]}
    assert alerts.pop("EAdaPruneRejectedRequests")["model_name"] == Server.NAME
    assert alerts.keys() <= {"EAdaPruneBudgetAtBound"}  # blank pictures are


def test_the_board_can_be_drawn(prometheus: Prometheus, tmp_path: Path) -> None:
    render.render(prometheus.url, tmp_path / "board.png", minutes=0.5)
    with Image.open(tmp_path / "board.png") as drawn:
        assert drawn.width > 1000
        assert len(drawn.convert("RGB").getcolors(2**20) or ()) > 100
