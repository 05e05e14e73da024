"""Writes what is derived in this folder:  python deploy/generate.py [--check]

- ``grafana/eadaprune.json``, the dashboard, from ``grafana/board.py``
- ``k8s/monitoring/prometheusrule.yaml``, for Prometheus' operator, from ``prometheus/rules.yml``

With ``--check`` nothing is written: the exit status is 1 if a file is stale, or if a query or rule names a metric that
neither this project nor vLLM defines.
"""

import importlib.util
import itertools
import re
import sys
from pathlib import Path
from typing import Any

import yaml
from grafana.board import MATCHERS, ROWS, Panel
from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    BigValueGraphMode,
    GraphGradientMode,
    LegendDisplayMode,
    LegendPlacement,
    TooltipDisplayMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat
from prometheus_client import CollectorRegistry

from eadaprune_vllm.frontend.metrics import Metrics

HERE = Path(__file__).parent
DATASOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
BUILDERS: dict[str, Any] = {"stat": stat.Panel, "timeseries": timeseries.Panel, "heatmap": heatmap.Panel}


def build(panel: Panel, number: int) -> Any:
    builder = BUILDERS[panel.kind]().id(number)
    builder.title(panel.title).description(f"Good: {panel.good}. {panel.description}").datasource(DATASOURCE)
    builder.span(panel.width).height(4 if panel.kind == "stat" else 8)
    for letter, query in zip("ABC", panel.queries, strict=False):
        target = prometheus.Dataquery().expr(query.expr).legend_format(query.legend or "__auto").ref_id(letter)
        if panel.kind == "heatmap":
            target.format(PromQueryFormat.HEATMAP)
        builder.with_target(target)
    builder.no_value("No traffic")
    if panel.kind == "heatmap":
        color = heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Blues").steps(64)
        return builder.y_axis(heatmap.YAxisConfig().unit(panel.unit)).color(color).show_tooltip().hide_legend()
    builder.unit(panel.unit)
    if panel.kind == "stat":
        builder.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"])).graph_mode(BigValueGraphMode.AREA)
    if panel.kind == "timeseries":
        builder.fill_opacity(10).gradient_mode(GraphGradientMode.OPACITY)
        legend = common.VizLegendOptions().display_mode(LegendDisplayMode.TABLE).placement(LegendPlacement.RIGHT)
        builder.legend(legend.show_legend(True).calcs(["lastNotNull"]))
        builder.tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
        if panel.from_zero:
            builder.min(0)
    if panel.max is not None:
        builder.max(panel.max)
    if panel.decimals is not None:
        builder.decimals(panel.decimals)
    return builder


def variable(name: str, label: str, query: str) -> dashboard.QueryVariable:
    builder = dashboard.QueryVariable(name).label(label).datasource(DATASOURCE).query(query)
    builder.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED).sort(VariableSort.ALPHABETICAL_ASC)
    return builder.multi(True).include_all(True).all_value(".*")


def board() -> str:
    """The dashboard as JSON."""
    served = "vllm:num_requests_running"  # also by servers without the plugin, to compare with
    builder = (
        dashboard.Dashboard("vLLM / EAdaPrune")
        .uid("vllm-eadaprune")
        .description("What per-image visual token budgets save, what they cost, and the engine beside it.")
        .tags(["vllm"])
        .refresh("30s")
        .time("now-1h", "now")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .link(dashboard.DashboardLink("vLLM").type(DashboardLinkType.DASHBOARDS).tags(["vllm"]).as_dropdown(True))
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(variable("job", "Job", f"label_values({served}, job)"))
        .with_variable(variable("model_name", "Model", f'label_values({served}{{job=~"$job"}}, model_name)'))
        .with_variable(
            variable("instance", "Instance", f"label_values({served}{{{MATCHERS.rsplit(',', 1)[0]}}}, instance)")
        )
        .with_variable(dashboard.AdHocVariable("filters").label("Filters").datasource(DATASOURCE))
    )
    numbers = itertools.count(1)
    for row in ROWS:
        heading = dashboard.Row(row.title).id(next(numbers)).collapsed(row.collapsed)
        panels = [build(panel, next(numbers)) for panel in row.panels]
        for panel in panels if row.collapsed else ():
            heading.with_panel(panel)
        builder.with_row(heading)
        for panel in () if row.collapsed else panels:
            builder.with_panel(panel)
    return JSONEncoder(sort_keys=True, indent=2).encode(builder.build()) + "\n"


def rule_object() -> str:
    """The rules as an object of Prometheus' operator."""
    spec = yaml.safe_load((HERE / "prometheus/rules.yml").read_text())
    manifest = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "eadaprune"},
        "spec": spec,
    }
    yaml.SafeDumper.add_representer(str, _as_block)
    note = "# Written by deploy/generate.py from deploy/prometheus/rules.yml\n"
    return note + yaml.safe_dump(manifest, sort_keys=False, width=120)


def _as_block(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Several lines stay several lines."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


def unknown_metrics(text: str) -> set[str]:
    """Names in queries that no exporter of ours or vLLM's has."""
    registry = CollectorRegistry()
    Metrics(registry)
    known = {family.name for family in registry.collect()}
    spec = importlib.util.find_spec("vllm")
    assert spec
    assert spec.origin
    for source in (Path(spec.origin).parent / "v1").rglob("*metrics/*.py"):
        known |= set(re.findall(r'"(vllm:\w+)"', source.read_text()))
    used = set(re.findall(r"\b(?:vllm:\w+|eadaprune_\w+)", re.sub(r"model:\w+:\w+", "", text)))
    return {name for name in used if name not in known and re.sub(r"_(total|bucket|sum|count)$", "", name) not in known}


def main(check: bool) -> int:
    made = {"grafana/eadaprune.json": board(), "k8s/monitoring/prometheusrule.yaml": rule_object()}
    unknown = unknown_metrics("".join(query.expr for row in ROWS for panel in row.panels for query in panel.queries))
    unknown |= unknown_metrics((HERE / "prometheus/rules.yml").read_text())
    if unknown:
        print(f"neither this project nor vLLM defines {', '.join(sorted(unknown))}")
        return 1
    for name, text in made.items():
        path = HERE / name
        if not check:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            print(f"deploy/{name} is stale; run: python deploy/generate.py")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:]))
