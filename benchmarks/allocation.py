"""Who should get the tokens:  python benchmarks/allocation.py

Held-out scenes and questions, the embedded model behind a real server. Several rules share the same mean budget out
among the same scenes, each scene is then pruned to just its number, by the same selector; so differences come from the
rule alone. Rules: the same for all; the threshold as the server applies it; that with a least number of tokens; the
threshold on other matrices (centred, rows normalized, past the projector); the threshold by span, for which no spectrum
is needed; and in proportion to how many things a scene shows, which no server can know. Writes ``allocation.json``.
"""

import asyncio
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import numpy as np
import torch
import typer
from common import RESULTS, about
from numpy.typing import NDArray
from quality import DTYPE, FLAGS, TARGETS, held_out
from rich.console import Console
from transformers import AutoImageProcessor
from vllm import LLM

from eadaprune_vllm.core.budget import Curve
from eadaprune_vllm.core.options import PruneOptions
from eadaprune_vllm.core.selectors import VisualTokens
from eadaprune_vllm.core.spectrum import Spectrum, spanned
from eadaprune_vllm.demo import MODEL
from eadaprune_vllm.demo.scenes import make_scene
from eadaprune_vllm.demo.server import Server
from eadaprune_vllm.tools.calibrate import solve
from eadaprune_vllm.tools.evaluate import Setting, exactly, interval, run
from eadaprune_vllm.tools.images import picture, read

FIXED = "the same for all"
BOUNDED = "threshold, at least half the mean"


def encoded(images: list[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each image the features ``[N, D]`` that an engine decides by, and the rows ``[N, W]`` that go to its language
    model; both float32."""
    processor = AutoImageProcessor.from_pretrained(MODEL)
    pixels = [processor(picture(read(image)), return_tensors="pt").pixel_values for image in images]

    def encode(model: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
        found = []
        with torch.inference_mode():
            for each in pixels:
                (rows,), (features,) = model.eadaprune_encode("image", pixel_values=each)
                found.append((features.float(), rows.float()))
        return found

    # In this process, which is the engine's then: a server that is started later is not told.
    with patch.dict(os.environ, {"VLLM_PLUGINS": "eadaprune", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}):
        llm = LLM(str(MODEL), dtype=DTYPE, enforce_eager=True, max_model_len=2048)
        (found,) = llm.apply_model(encode)
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = found
    return pairs


def centred(rows: torch.Tensor) -> torch.Tensor:
    return rows - rows.mean(0)


def spectral(matrix: torch.Tensor) -> NDArray[np.float64]:
    """``[N]`` float64, as the server has it."""
    return Spectrum.of([VisualTokens(matrix, None)]).thresholds.numpy()


# Of features, and of rows past the projector, what ``Curve`` goes by.
RULES: dict[str, Callable[[torch.Tensor, torch.Tensor], NDArray[np.float64]]] = {
    "threshold": lambda features, rows: spectral(features),
    "threshold, centred": lambda features, rows: spectral(centred(features)),
    "threshold, rows normalized": lambda features, rows: spectral(torch.nn.functional.normalize(features)),
    "threshold, past the projector": lambda features, rows: spectral(rows),
    "threshold, past the projector, centred": lambda features, rows: spectral(centred(rows)),
    "threshold, by span": lambda features, rows: spanned([VisualTokens(features, None)], 1.0, 1).thresholds.numpy(),
}


def allocations(asked: list[str], targets: list[int]) -> dict[tuple[int, str], dict[str, int]]:
    """By mean budget and rule, how many tokens each image gets.

    Args:
        asked: the image of each question: the mean is over questions.
        targets: mean budgets.
    """
    images = sorted(set(asked))
    matrices = encoded(images)
    things = {image: len(make_scene(int(Path(image).stem), held_out=True).things) + 1 for image in images}
    mean = sum(things[image] for image in asked) / len(asked)
    found = {}
    for target in targets:
        found[target, FIXED] = dict.fromkeys(images, target)
        found[target, "by the number of things"] = {image: round(things[image] * target / mean) for image in images}
    for rule, thresholds in RULES.items():
        curves = {image: Curve(image, thresholds(*each)) for image, each in zip(images, matrices, strict=True)}
        for target in targets:
            bounds = {rule: 1, BOUNDED: target // 2} if rule == "threshold" else {rule: 1}
            for name, least in bounds.items():
                options = PruneOptions(min_tokens=least, min_share=0)
                solved = solve([curves[image] for image in asked], target / len(matrices[0][0]), options)
                found[target, name] = {image: curve.budget(solved) for image, curve in curves.items()}
    return found


def main(
    scenes: Annotated[int, typer.Option(help="About nine questions are asked of each.")] = 220,
    target: Annotated[list[int], typer.Option(help="Mean budget; may be given several times.")] = list(TARGETS[1:]),  # noqa: B006
    output: Annotated[Path, typer.Option(help="Folder that takes the result.")] = RESULTS,
) -> None:
    console = Console()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results = held_out(folder / "questions", scenes)
        asked = [question.image for question in results.questions]
        settings = {}
        for (tokens, rule), counts in allocations(asked, target).items():
            kind = "fixed" if rule == FIXED else "adaptive"
            own = {image: exactly(count) for image, count in counts.items()}
            settings[tokens, rule] = Setting(f"{tokens} tokens: {rule}", kind, {"selector": "span"}, by_image=own)
        with Server(folder / "log", MODEL, *FLAGS, "--allowed-local-media-path", name) as server:
            asyncio.run(run(results, server.url, list(settings.values())))
    rows = results.summary()
    for ((tokens, _), setting), row in zip(settings.items(), rows, strict=True):
        against = results.correct[settings[tokens, FIXED].name]
        gain = results.correct[setting.name].astype(float) - against
        row["minus_fixed"] = {"mean": float(gain.mean()), "interval": interval(gain, np.array(asked))}
        groups = "  ".join(
            f"{group} {own['accuracy']:.3f} at {own['mean_tokens']:.0f}" for group, own in row["group"].items()
        )
        console.print(f"{setting.name}: {row['accuracy']:.3f} ({gain.mean():+.3f}); {groups}", highlight=False)
    output.mkdir(exist_ok=True)
    text = json.dumps({"about": about() | {"questions": len(results.questions)}, "settings": rows}, indent=1)
    (output / "allocation.json").write_text(text + "\n")


if __name__ == "__main__":
    typer.run(main)
