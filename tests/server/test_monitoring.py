"""A real Prometheus beside a real server: every query of the dashboard and every rule returns data."""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from grafana import render
from harness import Server
from openai import BadRequestError
from PIL import Image
from prometheus import Prometheus
from shared import noise

# What stays zero beside this server and its traffic, and why. All else moves.
ZERO = {
    "vllm:num_preemptions_total": "the KV cache is never full",
    "vllm:num_requests_waiting": "one request is sent after the other",
    "eadaprune_load_level": "no policy lowers thresholds under load",
    "eadaprune_load_lowered_total": "no policy lowers thresholds under load",
    "eadaprune_default_target": "the default is a threshold",
    "eadaprune_default_min_share": "the floor is min_tokens",
}
RECORDED = ["items:rate5m", "tokens_saved:rate5m", "kept:ratio5m", "decision_seconds:p95_5m"]


@pytest.fixture(scope="module")
def prometheus(
    pruning: Server, images: dict[str, Image.Image], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    """Watches a server that has traffic for as long as these tests last."""
    prometheus = Prometheus(tmp_path_factory.mktemp("prometheus"), pruning.url.removeprefix("http://"))
    over = Event()

    def ask() -> None:
        for number in itertools.takewhile(lambda _: not over.is_set(), itertools.count()):
            pruning.ask(images["coffee"], noise(number), "What is it?", max_tokens=64)
            pruning.ask(images["flat"])  # this and the next two are each at another bound
            pruning.ask(images["flat"], options={"min_share": 0.5})
            pruning.ask(noise(number), options={"energy": 0.999, "max_tokens": 1})
            with pytest.raises(BadRequestError):
                pruning.ask(images["flat"], options={"energy": 2})

    with ThreadPoolExecutor(1) as thread:
        traffic = thread.submit(ask)
        try:
            yield prometheus
        finally:
            over.set()
            traffic.result()
            prometheus.close()


def test_the_server_is_scraped(prometheus: Prometheus) -> None:
    def is_up() -> bool:
        targets = prometheus.get("targets")["activeTargets"]
        return [(target["health"], target["lastError"]) for target in targets] == [("up", "")]

    assert prometheus.waits_for(is_up)


@pytest.mark.parametrize(
    ("panel", "expr"),
    [(panel, expr) for panel in render.panels() for expr, _ in render.expressions(panel, "10s")],
)
def test_each_query_of_the_board_returns_data(prometheus: Prometheus, panel: dict[str, Any], expr: str) -> None:
    title = panel["title"]
    zero = [why for metric, why in ZERO.items() if metric in expr]
    values: list[float] = []

    def is_data() -> bool:
        values[:] = [value for value in prometheus.values(expr) if value == value]
        return bool(values) and (bool(zero) or max(values) > 0)

    assert prometheus.waits_for(is_data), f"{title}: {expr}: {values}"
    assert min(values) >= 0
    assert not zero or max(values) == 0, f"{title}: though {zero[0]}"
    if panel["fieldConfig"]["defaults"].get("unit") == "percentunit":
        assert max(values) <= 1.01


def test_every_rule_is_evaluated(prometheus: Prometheus) -> None:
    def rules_of() -> list[dict[str, Any]]:
        return [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]

    assert prometheus.waits_for(lambda: all(rule["health"] != "unknown" for rule in rules_of()))
    rules = rules_of()
    assert [(rule["name"], rule.get("lastError", "")) for rule in rules if rule["health"] != "ok"] == []
    assert len(rules) == 4 + 10


@pytest.mark.parametrize("name", RECORDED)
def test_recording_rules_have_data(prometheus: Prometheus, name: str) -> None:
    assert prometheus.waits_for(lambda: max(prometheus.values(f"model:eadaprune_{name}"), default=0) > 0)


def test_alerts_see_the_server(prometheus: Prometheus) -> None:
    """A fifth of the requests of this test are refused, which is what an alert is for; nothing else is wrong."""

    def alerts_of() -> dict[str, Any]:
        return {alert["labels"]["alertname"]: alert["labels"] for alert in prometheus.get("alerts")["alerts"]}

    assert prometheus.waits_for(lambda: "EAdaPruneRejectedRequests" in alerts_of())
    alerts = alerts_of()
    assert alerts.pop("EAdaPruneRejectedRequests")["model_name"] == Server.NAME
    assert alerts.keys() <= {
        "EAdaPruneBudgetAtBound",
        "EAdaPruneDefaultAtBound",
    }  # blank pictures are, and random weights


def test_dashboard_can_be_drawn(prometheus: Prometheus, tmp_path: Path) -> None:
    render.render(prometheus.url, tmp_path / "board.png", minutes=0.5)
    with Image.open(tmp_path / "board.png") as drawn:
        assert drawn.width > 1000
        assert len(drawn.convert("RGB").getcolors(2**20) or ()) > 100
