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
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

BOARD = Path(__file__).with_name("eadaprune.json")
WIDTH, HEIGHT = 0.75, 0.38  # of a column and a row of Grafana's grid, in inches
LEFT, RIGHT, TOP, BOTTOM = 0.75, 1.6, 0.4, 0.35  # beside and around the lines of a panel: axis, legend, title, time
INK, PALE = "#24292e", "#6e7781"

Series = list[tuple[str, list[tuple[float, float]]]]  # label, and values over minutes


def formatted(value: float, unit: str, decimals: int | None = None) -> str:
    """As Grafana writes a value."""
    match unit.partition(":"):
        case ("percentunit", _, _):
            return f"{100 * value:.3g}%"
        case ("s", _, _):
            return f"{1000 * value:.3g} ms" if 0 < value < 1 else f"{value:.3g} s"
        case ("Bps", _, _):
            return f"{EngFormatter(places=1)(value)}B/s"
        case (kind, _, counted):
            few = f"{value:.3g}" if decimals is None else f"{value:.{decimals}f}"
            number = f"{value / 1000:.3g}K" if value >= 1000 else few
            return f"{number} {'req/s' if kind == 'reqps' else counted}".rstrip()


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
    board = [inner for panel in json.loads(BOARD.read_text())["panels"] for inner in (panel, *panel.get("panels", ()))]
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in board)
    figure = plt.figure(figsize=(24 * WIDTH, (rows + 1) * HEIGHT))
    figure.text(0.5, 1, "vLLM / EAdaPrune", fontsize=16, color=INK, ha="center", va="top")
    for panel in board:
        place = panel["gridPos"]
        left, top = place["x"] * WIDTH, (rows - place["y"]) * HEIGHT
        if panel["type"] == "row":
            figure.text(
                0.006, (top - HEIGHT) / (rows + 1) / HEIGHT, panel["title"], fontsize=13, weight="bold", color=INK
            )
            continue
        right = 0.2 if panel["type"] in ("stat", "heatmap") else RIGHT
        box = (
            (left + LEFT) / 24 / WIDTH,
            (top - place["h"] * HEIGHT + BOTTOM) / (rows + 1) / HEIGHT,
            (place["w"] * WIDTH - LEFT - right) / 24 / WIDTH,
            (place["h"] * HEIGHT - TOP - BOTTOM) / (rows + 1) / HEIGHT,
        )
        series: Series = []
        for expr, legend in expressions(panel, interval):
            answer = httpx.get(f"{prometheus}/api/v1/query_range", params={"query": expr, **span})
            answer.raise_for_status()
            for found in answer.json()["data"]["result"]:
                label = "" if legend == "__auto" else legend
                for name, value in found["metric"].items():
                    label = label.replace("{{" + name + "}}", value)
                series.append((label, [((at - end) / 60, float(value)) for at, value in found["values"]]))
        _draw(figure.add_axes(box), panel, series)
    figure.savefig(output, dpi=60)
    plt.close(figure)


def _draw(axes: Axes, panel: dict[str, Any], series: Series) -> None:
    axes.set_title(panel["title"], loc="left", y=1, fontsize=11, color=INK)
    axes.tick_params(labelsize=8, colors=PALE)
    axes.spines[["top", "right"]].set_visible(False)
    drawn = [(label, [(at, value) for at, value in points if math.isfinite(value)]) for label, points in series]
    drawn = [(label, points) for label, points in drawn if points]
    if not drawn:
        axes.set_axis_off()
        axes.text(0.5, 0.5, panel["fieldConfig"]["defaults"]["noValue"], ha="center", transform=axes.transAxes)
        return
    {"heatmap": _heatmap, "stat": _stat, "timeseries": _lines}[panel["type"]](axes, panel, drawn)
    if panel["type"] != "stat":
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda minutes, _: f"{minutes:g} min" if minutes else "now"))


def _stat(axes: Axes, panel: dict[str, Any], series: Series) -> None:
    """The latest values, large, over what they were."""
    axes.set_axis_off()
    defaults = panel["fieldConfig"]["defaults"]
    for number, (label, points) in enumerate(series):
        value = formatted(points[-1][1], defaults["unit"], defaults.get("decimals"))
        middle = (number + 0.5) / len(series)
        axes.text(middle, 0.45, value, fontsize=19, color=INK, ha="center", transform=axes.transAxes)
        axes.text(middle, 0.05, label, fontsize=9, color=PALE, ha="center", transform=axes.transAxes)
    if len(series) == 1:
        times, values = zip(*series[0][1], strict=True)
        axes.fill_between(times, values, color="C0", alpha=0.2, linewidth=0)
        axes.set_ylim(0, 2.5 * max(*values, 1e-9))


def _lines(axes: Axes, panel: dict[str, Any], series: Series) -> None:
    """Lines, with name and latest value of each beside its end."""
    defaults = panel["fieldConfig"]["defaults"]
    for _, points in series:
        axes.plot(*zip(*points, strict=True), linewidth=1.5)
    axes.margins(x=0)
    axes.grid(axis="y", alpha=0.3)
    unit, decimals = defaults["unit"], defaults.get("decimals")
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: formatted(value, unit, decimals)))
    if "min" in defaults:
        highest = max(value for _, points in series for _, value in points)
        axes.set_ylim(0, defaults["max"] * 1.02 if "max" in defaults else highest * 1.1 or 1)
    low, high = axes.get_ylim()
    lowest = -math.inf
    for number, (label, points) in sorted(enumerate(series), key=lambda each: each[1][1][-1][1]):
        at = max((points[-1][1] - low) / (high - low), lowest)  # each name above the one below
        lowest = at + 0.09
        text = f"{label}  {formatted(points[-1][1], unit, decimals)}".strip()
        axes.text(1.02, at, text, fontsize=9, color=f"C{number}", va="center", transform=axes.transAxes)


def _heatmap(axes: Axes, panel: dict[str, Any], series: Series) -> None:
    """Cumulative buckets as cells: how many fell between each boundary and the one below."""
    ordered = sorted(series, key=lambda each: float(each[0]))
    before: dict[float, float] = {}
    rows = []
    for _, points in ordered:
        counts = dict(points)
        rows.append([max(count - before.get(at, 0), 0) for at, count in counts.items()])
        before = counts
    axes.imshow(rows, aspect="auto", origin="lower", cmap="Blues", extent=(min(before), max(before), 0, len(rows)))
    ticks = range(0, len(ordered) - 1, 2)
    unit = panel["options"]["yAxis"]["unit"]
    bounds = [float(ordered[tick][0]) for tick in ticks]
    names = [formatted(bound, unit) if unit == "percentunit" else f"{bound:g}" for bound in bounds]
    axes.set_yticks([tick + 1 for tick in ticks], names)  # at the upper edge of a cell


if __name__ == "__main__":
    render(sys.argv[1].rstrip("/"), Path(sys.argv[2]))
