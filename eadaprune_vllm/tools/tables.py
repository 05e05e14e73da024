"""Tables of results."""

import statistics
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from eadaprune_vllm.core.budget import Curve
from eadaprune_vllm.core.options import PruneOptions
from eadaprune_vllm.core.words import percent

_THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9999, 1.0)


def means(curves: Sequence[Curve], options: PruneOptions) -> Table:
    """Mean budgets of the images at several thresholds."""
    table = Table("threshold", "mean tokens", "mean share")
    for threshold in _THRESHOLDS:
        at = options.model_copy(update={"energy": threshold})
        tokens, share = (statistics.mean(of(curve, at) for curve in curves) for of in (Curve.budget, Curve.share))
        table.add_row(f"{threshold:g}", f"{tokens:.1f}", percent(share))
    return table


def budgets(found: Sequence[int], energy: float) -> Table:
    """How the budgets of images are distributed at one threshold."""
    quartiles = statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else [*found] * 3
    images = "1 image" if len(found) == 1 else f"{len(found)} images"
    table = Table(title=f"Tokens of {images} at energy {energy:g}")
    for heading in ("least", "quarter", "median", "three quarters", "most", "mean"):
        table.add_column(heading, justify="right")
    shown = [f"{value:.0f}" for value in (min(found), *quartiles, max(found))]
    table.add_row(*shown, f"{statistics.mean(found):.1f}")
    return table


def accuracy(rows: Sequence[dict[str, Any]], questions: int) -> Table:
    """Args:
    rows: as from ``Results.summary``.
    questions: their number.
    """
    table = Table(title="1 question" if questions == 1 else f"{questions} questions")
    for heading in ("setting", "mean tokens", "accuracy", "95 %", "adaptive - fixed"):
        table.add_column(heading, justify="left" if heading == "setting" else "right")
    for row in rows:
        gain = row.get("adaptive_minus_fixed")
        table.add_row(
            row["setting"],
            f"{row['mean_tokens']:.1f}",
            f"{row['accuracy']:.3f}",
            "{:.3f} to {:.3f}".format(*row["interval"]),
            "{:+.3f} ({:+.3f} to {:+.3f})".format(gain["mean"], *gain["interval"]) if gain else "",
        )
    return table
