"""What pruning does to answers:  python benchmarks/quality.py

Held-out scenes and questions, the embedded model behind a real server, the code of ``eadaprune evaluate``. Thresholds
are calibrated, with every bound off, for mean budgets of ``TARGETS`` tokens on other held-out scenes; then every
selector is asked at each threshold, and at a fixed budget of the mean that this threshold had. Writes ``quality.json``
and ``quality.png``.
"""

import asyncio
import json
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from common import RESULTS, about
from rich.console import Console

from eadaprune_vllm.core.budget import Curve
from eadaprune_vllm.core.draw import png
from eadaprune_vllm.core.options import UNBOUNDED, PruneOptions
from eadaprune_vllm.core.selectors import SELECTORS
from eadaprune_vllm.demo import MODEL
from eadaprune_vllm.demo.questions import write_questions
from eadaprune_vllm.demo.scenes import make_scene
from eadaprune_vllm.demo.server import Server
from eadaprune_vllm.tools.calibrate import solve
from eadaprune_vllm.tools.evaluate import UNPRUNED, Results, adaptive, run
from eadaprune_vllm.tools.examiner import Examiner
from eadaprune_vllm.tools.offline import OfflineModel
from eadaprune_vllm.tools.plots import accuracy
from eadaprune_vllm.tools.questions import read_questions

TARGETS = (96, 48, 24, 12)  # features have 144 numbers: below energy 1.0 no budget is larger
CALIBRATION = 200  # scenes
DTYPE = "float32"  # what is measured is pruning, not rounding; and not every CPU has instructions for bfloat16
FLAGS = ["--plugin", "eadaprune", "--eadaprune-min-tokens", "1", "--enforce-eager", "--max-model-len", "2048"]
FLAGS += ["--dtype", DTYPE]


def curve(examiner: Examiner, name: str, image: bytes) -> Curve:
    """What thresholds are solved on."""
    return Curve(name, np.array(examiner.examine(image, {"selector": "uniform"}, spectrum=True).spectrum))


def thresholds() -> dict[int, float]:
    """For each of ``TARGETS`` the threshold with that mean budget."""
    offline = OfflineModel(str(MODEL), dtype=DTYPE)
    scenes = (make_scene(10**6 + number, held_out=True).image for number in range(CALIBRATION))
    curves = [curve(offline, str(number), png(scene)) for number, scene in enumerate(scenes)]
    options = PruneOptions.model_validate(UNBOUNDED)
    return {target: solve(curves, target / len(curves[0].thresholds), options).energy for target in TARGETS}


def held_out(folder: Path, scenes: int) -> Results:
    """Questions about that many scenes, written to ``folder``, with nothing asked yet."""
    questions = read_questions(write_questions(folder, scenes))
    # The server reads the files itself: sent with every question they would take longer than its answer.
    return Results([one.model_copy(update={"image": Path(one.image).as_uri()}) for one in questions])


def main(
    scenes: Annotated[int, typer.Option(help="About nine questions are asked of each.")] = 300,
    selector: Annotated[list[str], typer.Option(help="May be given several times.")] = list(SELECTORS),  # noqa: B006
    output: Annotated[Path, typer.Option(help="Folder that takes the results.")] = RESULTS,
) -> None:
    console = Console()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results = held_out(folder / "questions", scenes)
        energies = thresholds()
        console.print(f"{len(results.questions)} questions; thresholds: {energies}")
        with Server(folder / "log", MODEL, *FLAGS, "--allowed-local-media-path", name) as server:
            settings = [UNPRUNED, *adaptive(energies.values(), selector)]
            asyncio.run(run(results, server.url, settings, with_matched=True))
    rows = results.summary()
    for row in rows:
        console.print(f"{row['setting']}: {row['accuracy']:.3f} at {row['mean_tokens']:.1f} tokens", highlight=False)
    output.mkdir(exist_ok=True)
    facts = {
        "scenes": scenes,
        "questions": len(results.questions),
        "chance": results.chance(),
        "thresholds": energies,
    }
    text = json.dumps({"about": about() | facts, "settings": rows}, indent=1)
    (output / "quality.json").write_text(text + "\n")
    accuracy(rows).savefig(output / "quality.png", dpi=100)


if __name__ == "__main__":
    typer.run(main)
