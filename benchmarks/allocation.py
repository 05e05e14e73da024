"""Who should get the tokens:  python benchmarks/allocation.py

Held-out scenes and questions, the embedded model behind a real server. Several rules share the same mean budget out
among the same scenes, each scene is then pruned to just its number, by the same selector; so differences come from the
rule alone. Rules: the same for all; the threshold as the server applies it; that with a least number of tokens; the
threshold on other matrices (centred, rows normalized, past the projector); and in proportion to how many things a scene
shows, which no server can know. Writes ``allocation.json``.
"""

import asyncio
import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from common import RESULTS, about
from quality import DTYPE, FLAGS, TARGETS, held_out
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from eadaprune_vllm.demo import MODEL
from eadaprune_vllm.demo.scenes import make_scene
from eadaprune_vllm.demo.server import Server
from eadaprune_vllm.options import PruneOptions
from eadaprune_vllm.selectors import VisualTokens
from eadaprune_vllm.spectrum import Spectrum
from eadaprune_vllm.tools.calibrate import Curve, solve
from eadaprune_vllm.tools.evaluate import Setting, exactly, interval, run
from eadaprune_vllm.tools.offline import OfflineModel, load_image

FIXED = "the same for all"
BOUNDED = "threshold, at least half the mean"


@cache
def projector() -> LlavaMultiModalProjector:
    module, prefix = LlavaMultiModalProjector(AutoConfig.from_pretrained(MODEL)), "multi_modal_projector."
    weights = load_file(MODEL / "model.safetensors").items()
    module.load_state_dict({name.removeprefix(prefix): rows for name, rows in weights if name.startswith(prefix)})
    return module.float()


@torch.inference_mode()
def projected(features: torch.Tensor) -> torch.Tensor:
    """What the language model is fed with, ``[N, H]`` float32."""
    rows: torch.Tensor = projector()(features.float())
    return rows


def centred(rows: torch.Tensor) -> torch.Tensor:
    return rows - rows.mean(0)


MATRICES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "threshold": lambda features: features,
    "threshold, centred": centred,
    "threshold, rows normalized": lambda features: torch.nn.functional.normalize(features),
    "threshold, past the projector": projected,
    "threshold, past the projector, centred": lambda features: centred(projected(features)),
}


def allocations(asked: list[str], targets: list[int]) -> dict[tuple[int, str], dict[str, int]]:
    """By mean budget and rule, how many tokens each image gets.

    Args:
        asked: the image of each question: the mean is over questions.
        targets: mean budgets.
    """
    offline, options = OfflineModel(str(MODEL), dtype=DTYPE), PruneOptions(min_tokens=1)
    images = sorted(set(asked))
    features = [offline.examine(load_image(image), options).encoding.tokens.features for image in images]
    things = {image: len(make_scene(int(Path(image).stem), held_out=True).things) + 1 for image in images}
    mean = sum(things[image] for image in asked) / len(asked)
    found = {}
    for target in targets:
        found[target, FIXED] = dict.fromkeys(images, target)
        found[target, "by the number of things"] = {image: round(things[image] * target / mean) for image in images}
    for rule, matrix in MATRICES.items():
        spectra = [Spectrum.of([VisualTokens(matrix(each), None)]) for each in features]
        curves = {image: Curve(image, spectrum.needed_above) for image, spectrum in zip(images, spectra, strict=True)}
        for target in targets:
            bounds = {rule: 1, BOUNDED: target // 2} if rule == "threshold" else {rule: 1}
            for name, least in bounds.items():
                solved = solve([curves[image] for image in asked], target, PruneOptions(min_tokens=least))
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
