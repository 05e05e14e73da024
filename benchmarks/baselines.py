"""Pruning beside what needs no spectrum, at the same number of tokens:  python benchmarks/baselines.py

Held-out scenes and questions, the embedded model behind a real server. The tokens of squares of 2 x 2 or 3 x 3 are
averaged, or only the middle ones stay (``merged.py``); selectors choose as many; and a threshold shares out as many in
the mean, with each least number of tokens. Thresholds are solved for on the spectra of these very images, counted once
for each question, so that means are equal; nothing else is fitted. Writes ``baselines.json`` and ``baselines.png``.
"""

import asyncio
import itertools
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from common import RESULTS, about
from merging import PLAIN, served
from quality import curve, held_out
from rich.console import Console

from eadaprune_vllm.core.budget import Curve
from eadaprune_vllm.core.options import PruneOptions
from eadaprune_vllm.tools.calibrate import solve
from eadaprune_vllm.tools.evaluate import UNPRUNED, Results, Setting, fixed, interval, run
from eadaprune_vllm.tools.examiner import ServedModel
from eadaprune_vllm.tools.images import read
from eadaprune_vllm.tools.plots import accuracy

SQUARES, OF_SQUARES = (144, 64), ("grid", "pooled", "pooled before")
MEANS = (144, 96, 64, 48)
MOST = 144  # numbers in a feature: below energy 1.0 no budget is larger
FLOORS = (1, 32, 64)  # none, and 1/18 and 1/9 of an image's tokens; 1/6 is the fixed budget of 96
# What others are compared with where both have as many tokens.
REFERENCES = [f"{way}, fixed" for way in (*OF_SQUARES, "span")] + ["span, adaptive", "span, at least 64, adaptive"]
Ways = dict[tuple[int, str], Setting]  # by mean budget and what it is called, which ends with its kind


def chosen(curves: list[Curve], selectors: list[str], floors: Sequence[int] = FLOORS) -> Ways:
    """What a server can be asked for as it is.

    Args:
        curves: of the image of each question.
        selectors: to choose by, at every mean budget.
        floors: least numbers, which are tried with the first of these; with the others only the first of them.
    """
    found: Ways = {}
    for selector, tokens in itertools.product(selectors, MEANS):
        (found[tokens, f"{selector}, fixed"],) = fixed([tokens], [selector])
        for least in floors if selector == selectors[0] else floors[:1]:
            if least < tokens < MOST:
                share = tokens / len(curves[0].thresholds)
                energy = solve(curves, share, PruneOptions(min_tokens=least)).energy
                way = f"{selector}, adaptive" if least == 1 else f"{selector}, at least {least}, adaptive"
                options = {"energy": energy, "min_tokens": least, "selector": selector}
                found[tokens, way] = Setting(f"{tokens} tokens: {way}", "adaptive", options)
    return found


def of_squares(name: str) -> Ways:
    """What ``uniform`` is asked for; in servers that ``merged.py`` changes it is what ``name`` says."""
    settings = zip(SQUARES, fixed(SQUARES, ["uniform"]), strict=True)
    return {
        (tokens, f"{name}, fixed"): replace(setting, name=f"{tokens} tokens: {name}") for tokens, setting in settings
    }


def minus(results: Results, ours: str, theirs: str, others: Results | None = None) -> dict[str, Any]:
    """By how much one setting is better than another, or than that of other results to the same questions, over all
    questions and by category and group, paired."""
    gain = results.correct[ours].astype(float) - (others or results).correct[theirs]
    images = np.array([question.image for question in results.questions])
    members = {"all": np.ones(len(images), np.bool_)}
    for attribute in ("category", "group"):
        values = np.array([getattr(question, attribute) for question in results.questions])
        members |= {str(value): values == value for value in np.unique(values)}
    return {
        name: {"mean": float(gain[own].mean()), "interval": interval(gain[own], images[own])}
        for name, own in members.items()
    }


def main(
    scenes: Annotated[int, typer.Option(help="About nine questions are asked of each.")] = 220,
    selector: Annotated[list[str], typer.Option(help="May be given several times.")] = ["span", "diversity"],  # noqa: B006
    output: Annotated[Path, typer.Option(help="Folder that takes the results.")] = RESULTS,
) -> None:
    console = Console()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results = held_out(folder / "questions", scenes)
        asked = [question.image for question in results.questions]
        with served(folder, PLAIN) as server:
            model = ServedModel(server.url)
            curves = {image: curve(model, image, read(image)) for image in dict.fromkeys(asked)}
            ways = chosen([curves[image] for image in asked], selector) | of_squares("uniform")
            asyncio.run(run(results, server.url, [UNPRUNED, *ways.values()]))
        for how in OF_SQUARES:
            own = of_squares(how)
            with served(folder, how) as server:
                asyncio.run(run(results, server.url, list(own.values())))
            ways |= own
    rows = results.summary()
    by_name = {setting.name: (tokens, way) for (tokens, way), setting in ways.items()}
    for row in rows[1:]:
        tokens, row["way"] = by_name[row["setting"]]
        others = {way: ways[tokens, way].name for way in REFERENCES if way != row["way"] and (tokens, way) in ways}
        row["minus"] = {way: minus(results, row["setting"], theirs) for way, theirs in others.items()}
    for row in rows:
        console.print(f"{row['setting']}: {row['accuracy']:.3f} at {row['mean_tokens']:.1f} tokens", highlight=False)
    output.mkdir(exist_ok=True)
    facts = {"scenes": scenes, "questions": len(asked), "chance": results.chance()}
    (output / "baselines.json").write_text(json.dumps({"about": about() | facts, "settings": rows}, indent=1) + "\n")
    lines = [row | {"selector": row.get("way", "").removesuffix(f", {row['kind']}")} for row in rows]
    accuracy(lines, by="category").savefig(output / "baselines.png", dpi=100)


if __name__ == "__main__":
    typer.run(main)
