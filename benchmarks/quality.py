"""What pruning does to answers:  python benchmarks/quality.py

Questions about held-out scenes go to the embedded model behind a real server, with the code of ``eadaprune evaluate``.
On other held-out scenes thresholds are found at which an image keeps ``TARGETS`` tokens on average, with every bound
off. Then every selector is asked at each threshold, and at a fixed budget of the same average. Writes ``quality.json``
and ``quality.png``.
"""

import asyncio
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from common import RESULTS, Output, save
from rich.console import Console

from eadaprune_vllm.core.budget import Curve, Targets
from eadaprune_vllm.core.draw import png
from eadaprune_vllm.core.options import UNBOUNDED, PruneOptions
from eadaprune_vllm.core.selectors import SELECTORS
from eadaprune_vllm.demo import MODEL
from eadaprune_vllm.demo.questions import write_questions
from eadaprune_vllm.demo.scenes import make_scene
from eadaprune_vllm.demo.server import Server
from eadaprune_vllm.tools.evaluate import UNPRUNED, Results, adaptive, run
from eadaprune_vllm.tools.offline import OfflineModel
from eadaprune_vllm.tools.plots import accuracy
from eadaprune_vllm.tools.questions import read_questions

TARGETS = (96, 48, 24, 12)  # tokens on average; features have 144 numbers, so no budget below energy 1.0 is larger
CALIBRATION = 200  # scenes on which thresholds are found
DTYPE = "float32"  # not every CPU has instructions for bfloat16, and rounding is not what is measured
FLAGS = ["--plugin", "eadaprune", "--eadaprune-min-tokens", "1", "--enforce-eager", "--max-model-len", "2048"]
FLAGS += ["--dtype", DTYPE]


def thresholds() -> dict[int, float]:
    """For each of ``TARGETS`` the threshold at which images keep so many tokens on average."""
    model, curves = OfflineModel(str(MODEL), dtype=DTYPE), []
    for number in range(10**6, 10**6 + CALIBRATION):
        image = png(make_scene(number, held_out=True).image)
        spectrum = model.examine(image, {"selector": "uniform"}, spectrum=True).spectrum
        curves.append(Curve(str(number), np.array(spectrum)))
    options = PruneOptions.model_validate(UNBOUNDED)
    targets = Targets(curves, options)
    return {target: targets.energy(target / len(curves[0].thresholds)) for target in TARGETS}


def main(
    scenes: Annotated[int, typer.Option(help="Scenes; about nine questions are asked about each.")] = 300,
    selector: Annotated[list[str], typer.Option(help="Selectors to compare.")] = list(SELECTORS),  # noqa: B006
    output: Output = RESULTS,
) -> None:
    console = Console()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        questions = read_questions(write_questions(folder / "questions", scenes))
        # The server reads the files itself: sent with every question they would take longer than its answer.
        results = Results([one.model_copy(update={"image": Path(one.image).as_uri()}) for one in questions])
        energies = thresholds()
        console.print(f"{len(questions)} questions; thresholds: {energies}")
        with Server(folder / "log", MODEL, *FLAGS, "--allowed-local-media-path", name) as server:
            settings = [UNPRUNED, *adaptive(energies.values(), selector)]
            asyncio.run(run(results, server.url, settings, with_matched=True))
    rows = results.summary()
    for row in rows:
        console.print(f"{row['setting']}: {row['accuracy']:.3f} at {row['mean_tokens']:.1f} tokens", highlight=False)
    facts = {"scenes": scenes, "questions": len(questions), "chance": results.chance()}
    save(output / "quality.json", facts | {"thresholds": energies}, settings=rows)
    accuracy(rows).savefig(output / "quality.png", dpi=100)


if __name__ == "__main__":
    typer.run(main)
