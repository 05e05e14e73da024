"""Draws the dashboard without Grafana, from a running Prometheus:  python deploy/grafana/render.py URL OUTPUT.png

For looking at what the board would show, and for documents; each panel asks what Grafana's would ask.
"""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import EngFormatter, Formatter, FuncFormatter, PercentFormatter

BOARD = Path(__file__).with_name("eadaprune.json")
FORMATS: dict[str, Formatter] = {
    "percentunit": PercentFormatter(1),
    "s": EngFormatter("s"),
    "Bps": EngFormatter("B/s"),
    "short": FuncFormatter(lambda value, _: EngFormatter()(value) if abs(value) >= 1000 else f"{value:g}"),
}


def panels() -> list[dict[str, Any]]:
    """All panels of the board but headings, those of collapsed rows included."""
    board = json.loads(BOARD.read_text())
    every = [inner for panel in board["panels"] for inner in (panel, *panel.get("panels", ()))]
    return [panel for panel in every if panel["type"] != "row"]


def expressions(panel: dict[str, Any], interval: str) -> list[tuple[str, str]]:
    """The queries of a panel with everything selected, and their legends."""
    found = []
    for target in panel["targets"]:
        expr = target["expr"].replace("$__rate_interval", interval)
        for variable in ("job", "model_name", "instance"):
            expr = expr.replace(f"${variable}", ".*")
        found.append((expr, target["legendFormat"]))
    return found


def render(prometheus: str, output: Path, minutes: float = 5, interval: str = "15s", step: float = 1) -> None:
    """Draw the last ``minutes`` of every panel.

    Args:
        prometheus: its address.
        output: PNG to write.
        interval: what rates are taken over.
        step: seconds between points.
    """
    end = time.time()
    span = {"start": end - 60 * minutes, "end": end, "step": step}
    every = panels()
    columns = 3
    figure, grid = plt.subplots(math.ceil(len(every) / columns), columns, figsize=(18, 26), layout="constrained")
    for axes in grid.flat[len(every) :]:
        axes.axis("off")
    for axes, panel in zip(grid.flat, every, strict=False):
        series = []
        for expr, legend in expressions(panel, interval):
            answer = httpx.get(f"{prometheus}/api/v1/query_range", params={"query": expr, **span})
            answer.raise_for_status()
            for found in answer.json()["data"]["result"]:
                label = legend
                for name, value in found["metric"].items():
                    label = label.replace("{{" + name + "}}", value)
                series.append((label, [(at - end, float(value)) for at, value in found["values"]]))
        _draw(axes, panel, series)
    figure.suptitle("vLLM / EAdaPrune", fontsize=16)
    figure.savefig(output, dpi=60)
    plt.close(figure)


def _draw(axes: Any, panel: dict[str, Any], series: list[tuple[str, list[tuple[float, float]]]]) -> None:
    axes.set_title(panel["title"], loc="left", fontsize=11)
    defaults = panel["fieldConfig"]["defaults"]
    unit = FORMATS[defaults.get("unit") or panel["options"]["yAxis"]["unit"]]
    drawn = [(label, [(at, value) for at, value in points if math.isfinite(value)]) for label, points in series]
    if not any(points for _, points in drawn):
        axes.text(0.5, 0.5, defaults["noValue"], ha="center", va="center", transform=axes.transAxes)
        return
    if panel["type"] == "heatmap":
        _heatmap(axes, series)
        return
    right = {override["matcher"]["options"]: override for override in panel["fieldConfig"]["overrides"]}
    other: Any = axes.twinx() if right else None
    for number, (label, points) in enumerate(drawn):
        place = other if label in right else axes
        place.plot(*zip(*points, strict=True), label=label, color=f"C{number}")
        if label in right:
            values = {each["id"]: each["value"] for each in right[label]["properties"]}
            place.yaxis.set_major_formatter(FORMATS[values["unit"]])
    axes.yaxis.set_major_formatter(unit)
    axes.set_ylim(0, defaults["max"] * 1.02 if "max" in defaults else max(axes.get_ylim()[1], 1e-3))
    if any(label != "__auto" for label, _ in drawn):
        shown = [line for each in (axes, other) if each for line in each.get_lines()]
        axes.legend(shown, [line.get_label() for line in shown], loc="upper left", fontsize=8)


def _heatmap(axes: Any, series: list[tuple[str, list[tuple[float, float]]]]) -> None:
    """Cumulative buckets as cells: how many fell between each boundary and the one below."""
    ordered = sorted(series, key=lambda each: float(each[0]))
    before: dict[float, float] = {}
    rows = []
    for _, points in ordered:
        counts = dict(points)
        rows.append([max(count - before.get(at, 0), 0) for at, count in counts.items()])
        before = counts
    axes.imshow(rows, aspect="auto", origin="lower", cmap="Blues", extent=(min(before), max(before), 0, len(rows)))
    ticks = range(0, len(ordered), 3)
    axes.set_yticks([tick + 0.5 for tick in ticks], [ordered[tick][0] for tick in ticks])


if __name__ == "__main__":
    render(sys.argv[1].rstrip("/"), Path(sys.argv[2]))
