"""Figures of results."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, ScalarFormatter, StrMethodFormatter
from PIL import Image

from eadaprune_vllm.core.item_report import ItemReport

_STYLES = {"adaptive": "-o", "fixed": "--x"}
_LEAST_BARS, _MOST_BARS = 20, 40


def histogram(budgets: Sequence[int], title: str) -> Figure:
    """How many images keep how many tokens: whole numbers of both."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    spread = max(budgets) + 1 - min(budgets)
    width = -(-spread // _MOST_BARS)
    bars = max(-(-spread // width), _LEAST_BARS) + 2
    first = min(budgets) - max((bars * width - spread) // 2, width)
    edges = [first + width * number - 0.5 for number in range(bars + 1)]
    axes.hist(budgets, bins=edges, color="tab:blue")
    average = sum(budgets) / len(budgets)
    axes.axvline(average, color="black", linestyle="--", label=f"mean {average:.1f}")
    axes.set_xlim(max(edges[0], 0), edges[-1])
    axes.margins(y=0.15)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("tokens an image keeps")
    axes.set_ylabel("images")
    axes.set_title(title, fontsize=10)
    axes.legend()
    return figure


def accuracy(rows: Sequence[dict[str, Any]], by: str = "group") -> Figure:
    """Accuracy against mean tokens, overall and for each group (or category) of questions.

    Args:
        rows: as from ``Results.summary``.
        by: ``group`` or ``category``.
    """
    groups = list(rows[0][by])
    views = ["all questions", *groups] if len(groups) > 1 else ["all questions"]
    figure = Figure(figsize=(6 * min(len(views), 3), 4.5 * -(-len(views) // 3)), layout="constrained")
    grid = figure.subplots(-(-len(views) // 3), min(len(views), 3), squeeze=False).ravel()
    for view, axes in zip(views, grid, strict=False):
        _accuracy(axes, view, [row if view == "all questions" else row[by][view] | _identity(row) for row in rows])
    for axes in grid[len(views) :]:
        axes.set_visible(False)
    next(iter(figure.axes)).legend(fontsize=7)
    return figure


def _identity(row: dict[str, Any]) -> dict[str, Any]:
    return {"kind": row["kind"], "selector": row["selector"]}


def _accuracy(axes: Axes, title: str, rows: Sequence[dict[str, Any]]) -> None:
    selectors = list(dict.fromkeys(row["selector"] for row in rows if row["kind"] != "none"))
    for number, selector in enumerate(selectors):
        for kind, style in _STYLES.items():
            own = sorted(
                (row for row in rows if (row["kind"], row["selector"]) == (kind, selector)),
                key=lambda row: row["mean_tokens"],
            )
            if own:
                errors = [[abs(row["interval"][end] - row["accuracy"]) for row in own] for end in (0, 1)]
                axes.errorbar(
                    [row["mean_tokens"] for row in own],
                    [row["accuracy"] for row in own],
                    errors,
                    fmt=style,
                    color=f"C{number}",
                    elinewidth=0.5,
                    label=f"{selector}, {kind}",
                )
    for row in rows:
        if row["kind"] == "none":
            axes.axhline(row["accuracy"], color="black", linewidth=0.8, label="no pruning")
    axes.set_xscale("log", base=2)
    tokens = [row["mean_tokens"] for row in rows if row["kind"] != "none"] or [rows[0]["mean_tokens"]]
    axes.set_xlim(min(tokens) / 1.25, max(tokens) * 1.25)
    axes.xaxis.set_major_locator(LogLocator(2, (1, 1.5)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    low, high = axes.get_ylim()
    axes.set_ylim(max(low - 0.05, 0), min(high + 0.05, 1.02))
    axes.set_xlabel("tokens an image keeps on average")
    axes.set_ylabel("accuracy")
    axes.set_title(title)


def caption(report: ItemReport) -> str:
    threshold = f"energy {report.energy_threshold:g}"
    if report.target is not None:
        threshold = f"target {report.target:g}, {threshold}"
    bound = f" ({report.bound})" if report.bound else ""
    return f"{threshold}\n{report.kept_tokens} of {report.visual_tokens} tokens{bound}"


def _energy(report: ItemReport, k: int, curve: Sequence[tuple[int, float]]) -> float:
    """The energy of a budget on the curve."""
    known = [energy for energy in (report.spectral_energy, report.span_energy) if energy is not None]
    return (known or [energy for tokens, energy in reversed(curve) if tokens <= k])[0]


def explanation(
    panels: Sequence[tuple[str, Image.Image]],
    curve: Sequence[tuple[int, float]],
    chosen: Sequence[ItemReport],
) -> Figure:
    """An image with several thresholds, above the curve of its energy.

    Args:
        panels: captions and pictures.
        curve: kept tokens, and the share of the energy they hold.
        chosen: the decision at each threshold.
    """
    figure = Figure(figsize=(3.2 * max(len(panels), 3), 6), layout="constrained")
    layout = figure.add_gridspec(2, max(len(panels), 3), height_ratios=(3, 2))
    for number, (caption, picture) in enumerate(panels):
        axes = figure.add_subplot(layout[0, number])
        axes.imshow(picture)
        axes.set_title(caption, fontsize=9)
        axes.axis("off")
    axes = figure.add_subplot(layout[1, :])
    # The missing share on a logarithmic scale, because useful thresholds are close to 1.
    missing = [max(1 - energy, 1e-5) for _, energy in curve]
    axes.plot([k for k, _ in curve], missing, color="black")
    for number, report in enumerate(chosen):
        k, label = report.kept_tokens - report.newline_tokens, f"energy {report.energy_threshold:g}"
        axes.plot(k, max(1 - _energy(report, k, curve), 1e-5), "o", color=f"C{number}", label=f"{label}: {k} tokens")
        axes.axvline(k, color=f"C{number}", linewidth=0.5)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_yscale("log")
    axes.invert_yaxis()
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{1 - value:g}"))
    axes.set_xlabel("tokens")
    axes.set_ylabel("share of the energy")
    axes.legend(fontsize=8)
    return figure
