"""What it costs to decide on an image in windows:  python benchmarks/windows.py

Held-out scenes and questions, the embedded model behind real servers. Of large images the plugin decides on windows,
each with a spectrum and a selection of its own. Here windows are so small that an image of 576 tokens has several: the
whole image, halves, quarters and ninths of it keep equally many tokens on average, once of each image and once by a
threshold, which is solved for on the spectra of these very images. Writes ``windows.json``.
"""

import asyncio
import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from baselines import chosen, minus
from common import RESULTS, about
from merging import PLAIN, served
from quality import curve, held_out
from rich.console import Console

from eadaprune_vllm.tools.evaluate import Results, run
from eadaprune_vllm.tools.examiner import ServedModel
from eadaprune_vllm.tools.images import read

WINDOWS = (PLAIN, "288", "144", "64")


def ask(how: str, folder: Path, scenes: int) -> Results:
    results = held_out(folder / "questions", scenes)
    asked = [question.image for question in results.questions]
    with served(folder, how) as server:
        model = ServedModel(server.url)
        curves = {image: curve(model, image, read(image)) for image in dict.fromkeys(asked)}
        ways = chosen([curves[image] for image in asked], ["span"], [1])
        asyncio.run(run(results, server.url, list(ways.values())))
    return results


def main(
    scenes: Annotated[int, typer.Option(help="About nine questions are asked of each.")] = 80,
    output: Annotated[Path, typer.Option(help="Folder that takes the result.")] = RESULTS,
) -> None:
    console, rows = Console(), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as name:
        by_window = {how: ask(how, Path(name) / how, scenes) for how in WINDOWS}
    whole = by_window[PLAIN]
    for how, results in by_window.items():
        for row in results.summary():
            row["window"] = "whole" if how == PLAIN else int(how)
            row["minus_whole"] = minus(results, row["setting"], row["setting"], whole)
            rows.append(row)
            gain = row["minus_whole"]["all"]
            console.print(
                f"{row['setting']}, {row['window']}: {row['accuracy']:.3f} at {row['mean_tokens']:.1f} tokens"
                f" ({gain['mean']:+.3f}, {gain['interval'][0]:+.3f} to {gain['interval'][1]:+.3f})",
                highlight=False,
            )
    output.mkdir(exist_ok=True)
    facts = {"scenes": scenes, "questions": len(whole.questions)}
    (output / "windows.json").write_text(json.dumps({"about": about() | facts, "settings": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
