"""What is in deploy/ and docker/ is current, valid, and fits together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from grafana import render
from shared import ROOT, program, run

DEPLOY = ROOT / "deploy"


def test_generated_files_are_current_and_name_existing_metrics() -> None:
    run(sys.executable, "deploy/generate.py", "--check")


def test_a_stale_file_and_an_unknown_metric_are_found(tmp_path: Path) -> None:
    for change, message in (
        ('sed -i "s/Visual tokens saved/Tokens/" deploy/grafana/board.py', "deploy/grafana/eadaprune.json is stale"),
        ('sed -i "s/eadaprune_tokens_saved_total/eadaprune_saved_total/" deploy/prometheus/rules.yml', "saved_total"),
        ('sed -i "s/vllm:num_requests_running/vllm:requests/" deploy/grafana/board.py', "defines vllm:requests"),
    ):
        run("rm", "-rf", tmp_path / "deploy")
        run("cp", "-r", DEPLOY, tmp_path)
        run("sh", "-c", change, cwd=tmp_path)
        command = [sys.executable, "deploy/generate.py", "--check"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ)
        assert done.returncode == 1
        assert message in done.stdout


def test_dashboard_follows_conventions() -> None:
    board = json.loads((DEPLOY / "grafana/eadaprune.json").read_text())
    assert (board["title"], board["uid"], board["tags"]) == ("vLLM / EAdaPrune", "vllm-eadaprune", ["vllm"])
    names = [variable["name"] for variable in board["templating"]["list"]]
    assert names == ["datasource", "job", "model_name", "instance", "filters"]
    panels = [inner for panel in board["panels"] for inner in (panel, *panel.get("panels", ()))]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        if panel["type"] != "row":
            assert panel["description"].split()[-1].startswith(("eadaprune_", "vllm:"))
            assert panel["description"].startswith("Good: ")
            assert panel["datasource"]["uid"] == "${datasource}"
        if panel["type"] == "timeseries":
            assert panel["options"]["legend"].items() >= {"displayMode": "table", "placement": "right"}.items()
            is_rate = all("(rate(" in target["expr"] for target in panel["targets"])
            assert not is_rate or panel["fieldConfig"]["defaults"]["unit"] != "short" or panel["title"].endswith("mean")


@pytest.mark.parametrize(
    ("value", "unit", "written"),
    [
        (0.163, "percentunit", "16.3%"),
        (0.0495, "s", "49.5 ms"),
        (2.5, "s", "2.5 s"),
        (0, "s", "0 s"),
        (2_100_000, "Bps", "2.1 MB/s"),
        (1090, "count:tok/s", "1.09K tok/s"),
        (0.25, "reqps", "0.25 req/s"),
        (3, "short", "3"),
    ],
)
def test_values_are_drawn_with_their_units(value: float, unit: str, written: str) -> None:
    assert render.formatted(value, unit) == written


def test_a_default_threshold_is_drawn_with_four_digits() -> None:
    (panel,) = (panel for panel in render.panels() if panel["title"] == "Threshold")
    defaults = panel["fieldConfig"]["defaults"]
    assert render.formatted(0.9997, defaults["unit"], defaults["decimals"]) == "0.9997"


def test_rules_and_alerts() -> None:
    promtool = program("promtool")
    run(promtool, "check", "rules", DEPLOY / "prometheus/rules.yml")
    run(promtool, "test", "rules", "rules.test.yml", cwd=DEPLOY / "prometheus")


def test_each_alert_has_a_test_and_a_section_in_the_runbook() -> None:
    groups = yaml.safe_load((DEPLOY / "prometheus/rules.yml").read_text())["groups"]
    alerts = {rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule}
    tests = yaml.safe_load((DEPLOY / "prometheus/rules.test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test.get("alert_rule_test", ())]
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == alerts
    assert {case["alertname"] for case in cases if not case.get("exp_alerts")} == alerts
    runbook = (DEPLOY / "README.md").read_text()
    assert {alert for alert in alerts if f"| `{alert}` |" in runbook} == alerts


def test_prometheus_takes_its_configuration(tmp_path: Path) -> None:
    text = (DEPLOY / "prometheus/prometheus.yml").read_text()
    (tmp_path / "prometheus.yml").write_text(text.replace("/etc/prometheus", str(DEPLOY / "prometheus")))
    run(program("promtool"), "check", "config", tmp_path / "prometheus.yml")


def test_compose_mounts_what_is_there_and_has_a_server_per_profile() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    for service in compose["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert source in compose["volumes"] or (DEPLOY / source).exists()
        if build := service.get("build"):
            assert (DEPLOY / build["context"] / build["dockerfile"]).exists()
    for profile in ("cpu", "gpu"):
        names = {name for name, service in compose["services"].items() if profile in service["profiles"]}
        assert names == {f"server-{profile}", "prometheus", "grafana"}
    target = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())["scrape_configs"][0]["static_configs"]
    assert target == [{"targets": ["server:8000"]}]
    for name in ("server-cpu", "server-gpu"):
        assert compose["services"][name]["networks"]["default"]["aliases"] == ["server"]


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_compose_takes_its_file(profile: str) -> None:
    run(program("docker-compose"), "-f", DEPLOY / "compose.yaml", "--profile", profile, "config", "--quiet")


@pytest.mark.parametrize("image", ["cpu", "cuda"])
def test_dockerfiles_are_linted(image: str) -> None:
    run(Path(sys.executable).with_name("hadolint"), f"docker/{image}/Dockerfile")
