"""Trains the embedded model, in two parts as LLaVA was:

    python benchmarks/training/train.py tower tower.pt
    python benchmarks/training/train.py language tower.pt OUTPUT

A LLaVA-1.5 of a few million parameters learns to answer questions about generated scenes
(``eadaprune_vllm.demo.scenes``). On 2 CPU cores, under two hours.

The tower learns alone what CLIP's brings from its own training: for each patch, what it shows, in which colour and
where, which letters, and whether it is the middle of something; for the CLS token, what the scene has. The heads that
say so are thrown away. It sees windows of a quarter of a scene, where things and places are what they are in the whole,
and at last the whole.

The language model and the projector then learn from answers to questions about what the tower, now fixed, makes of
whole scenes: of several questions at once, each of which sees the image and itself. At first it is shown all patches of
things and some of the rest, half of the image, which takes half of the time; then all. Nothing is pruned by what a
selector says. Three more losses lead there, at the end of each question: the first layer is to hold its words, the
first heads of the next ones to look at what it is about, and the second layer to hold what that is. The positions of
image tokens are scaled at random, so that places are learnt from features rather than from how many tokens came before.
"""

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from data import GRID, IGNORED, Asked, Looks, Windows, ask, collate, look, make_tokenizer
from learner import Learner
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from eadaprune_vllm.demo.model import save_model
from eadaprune_vllm.demo.questions import CATEGORIES
from eadaprune_vllm.demo.scenes import Scene, make_scene


@dataclass(frozen=True)
class Stage:
    """A part of what the tower learns from.

    Attributes:
        side: of the windows that it sees, in patches.
        batch: windows per step.
        steps: how many.
    """

    side: int
    batch: int
    steps: int


TOWER = (Stage(12, 48, 1600), Stage(GRID, 16, 250))
LANGUAGE_SCENES, LANGUAGE_STEPS, LANGUAGE_BATCH = 4000, 2200, 8
THIN = 0.7  # share of the language model's steps that see half of the patches
RATE, WARM_UP, WEIGHT_DECAY = 1.5e-3, 100, 0.02
COOLING = 0.3  # share of all steps over which the rate falls to zero

EVERYWHERE = torch.arange(GRID**2)

app = typer.Typer()
Scale = Annotated[float, typer.Option(help="Share of the steps to take, for a try.")]
Threads = Annotated[int, typer.Option(help="Results depend on it in the last digits.")]
TowerFile = Annotated[Path, typer.Argument(help="File of the tower's weights.")]


@app.command("tower")
def train_tower(tower: TowerFile, scale: Scale = 1.0, threads: Threads = 2) -> None:
    """Teach the tower, and write its weights."""
    learner, _ = _start(threads)
    stages = [(stage, round(stage.steps * scale)) for stage in TOWER]
    weights = [learner.llava.model.vision_tower, *learner.heads]
    optimizer = Optimizer(weights, sum(steps for _, steps in stages))
    seed = 0
    for stage, steps in stages:
        # One worker, so that the order of scenes is always the same.
        windows = Windows(seed, stage.side)
        loader = iter(DataLoader(windows, stage.batch, collate_fn=collate, num_workers=1, prefetch_factor=8))
        for _ in range(steps):
            losses, named = learner.see(next(loader))
            optimizer.step(losses, {"named": named})
        seed += stage.batch * steps
        print(f"after {stage}: named {named_right(learner, 128):.3f}", flush=True)
        torch.save(learner.llava.model.vision_tower.state_dict(), tower)


@app.command("language")
def train_language(
    tower: TowerFile,
    output: Annotated[Path, typer.Argument(help="Folder that takes the model; must not exist.")],
    scale: Scale = 1.0,
    threads: Threads = 2,
) -> None:
    """Teach the language model and the projector, and write the model."""
    if output.exists():
        raise typer.BadParameter(f"{output} exists")
    learner, tokenizer = _start(threads)
    learner.llava.model.vision_tower.load_state_dict(torch.load(tower))
    steps = round(LANGUAGE_STEPS * scale)
    known = Known(learner, round(LANGUAGE_SCENES * scale))
    weights = [
        learner.llava.model.multi_modal_projector,
        learner.llava.model.language_model,
        learner.llava.lm_head,
        learner.words,
        learner.subject,
    ]
    optimizer = Optimizer(weights, steps)
    random = np.random.default_rng(0)
    for _ in range(steps):
        chosen = random.permutation(len(known.scenes))[:LANGUAGE_BATCH]
        asked = collate([ask(tokenizer, known.scenes[index], random, each=3) for index in chosen])
        image, patches = known.features[chosen].float(), EVERYWHERE.expand(len(chosen), -1)
        if optimizer.done < THIN * steps:
            image, patches, asked = thin(image, known.thing[chosen], asked)
        losses, said = learner.answer(image, patches, asked, jitter=True)
        optimizer.step(losses, {"said": said})
        if optimizer.done % 500 == 0:
            print(accuracy(learner, tokenizer, 128), flush=True)
    save_model(learner.llava, tokenizer, output)
    found = {
        "parameters": sum(weight.numel() for weight in learner.llava.parameters()),
        "accuracy": accuracy(learner, tokenizer, 512),
    }
    (output / "training.json").write_text(json.dumps(found, indent=1) + "\n")
    print(found)


class Known:
    """Scenes that the tower has not learnt from, and what it makes of them, computed once.

    Attributes:
        scenes: what they show.
        features: ``[scenes, N, D]`` float16.
        thing: ``[scenes, N]`` bool, whether a patch shows a thing.
    """

    def __init__(self, learner: Learner, count: int) -> None:
        first, start = sum(stage.batch * stage.steps for stage in TOWER), time.monotonic()
        self.scenes: list[Scene] = []
        features, things = [], []
        for batch in batches(first, count, held_out=False):
            looks = collate([look(scene) for scene in batch])
            self.scenes += batch
            features.append(seen(learner, looks).half())
            things.append(looks.names > 0)
        self.features, self.thing = torch.cat(features), torch.cat(things)
        print(f"saw {len(self.scenes)} scenes in {time.monotonic() - start:.0f} s", flush=True)


def thin(image: torch.Tensor, thing: torch.Tensor, asked: Asked) -> tuple[torch.Tensor, torch.Tensor, Asked]:
    """All patches of things and, drawn at random, some of the rest: half of the image.

    Args:
        image: features ``[B, N, D]``.
        thing: ``[B, N]`` bool.
        asked: about these images.

    Returns:
        The features ``[B, N // 2, D]``, which patches they are ``[B, N // 2]``, and the questions about them.
    """
    kept = (torch.rand(thing.shape) + thing).topk(thing.shape[1] // 2).indices.sort().values
    about = asked.about.gather(2, kept[:, None].expand(-1, asked.about.shape[1], -1))
    return image.gather(1, kept[..., None].expand(-1, -1, image.shape[-1])), kept, replace(asked, about=about)


def _start(threads: int) -> tuple[Learner, PreTrainedTokenizerFast]:
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    tokenizer = make_tokenizer()
    return Learner(tokenizer), tokenizer


class Optimizer:
    """AdamW whose rate rises at first and falls at last; it says how it goes."""

    def __init__(self, modules: Iterable[torch.nn.Module], total: int) -> None:
        self.total, self.done, self._start = total, 0, time.monotonic()
        self._weights = [weight for module in modules for weight in module.parameters()]
        decayed = [weight for weight in self._weights if weight.ndim > 1]
        others = [weight for weight in self._weights if weight.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
        self._adamw = torch.optim.AdamW(groups, betas=(0.9, 0.98))
        self._shown: dict[str, float] = {}

    def step(self, losses: dict[str, torch.Tensor], rights: dict[str, torch.Tensor]) -> None:
        """Lower the sum of losses; show their running means and those of what was right."""
        rate = RATE * min(1.0, (self.done + 1) / WARM_UP, (self.total - self.done) / (COOLING * self.total))
        for group in self._adamw.param_groups:
            group["lr"] = rate
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._weights, 1.0)
        self._adamw.step()
        self._adamw.zero_grad()
        self.done += 1
        for name, value in (losses | {name: right.float().mean() for name, right in rights.items()}).items():
            latest = float(value.detach())
            self._shown[name] = 0.95 * self._shown.get(name, latest) + 0.05 * latest
        if self.done % 50 == 0:
            seconds = time.monotonic() - self._start
            print(
                f"{self.done}/{self.total} {seconds:.0f}s", {k: round(v, 3) for k, v in self._shown.items()}, flush=True
            )


def seen(learner: Learner, looks: Looks) -> torch.Tensor:
    """The features that the projector is fed with, ``[scenes, N, D]``."""
    with torch.inference_mode():
        return learner.tower(looks.pixels, looks.patches)[0]


def batches(first: int, count: int, held_out: bool) -> Iterator[list[Scene]]:
    """At least that many scenes from a seed on, by 16."""
    for start in range(first, first + count, 16):
        yield [make_scene(seed, held_out) for seed in range(start, start + 16)]


def named_right(learner: Learner, scenes: int) -> float:
    """Share of the patches of things in held-out scenes that the tower names right."""
    right = []
    for batch in batches(0, scenes, held_out=True):
        with torch.inference_mode():
            _, named = learner.see(collate([look(scene) for scene in batch]))
        right.append(named.float())
    return float(torch.cat(right).mean())


def accuracy(learner: Learner, tokenizer: PreTrainedTokenizerFast, scenes: int) -> dict[str, float]:
    """Share of questions about held-out scenes that are answered right, word for word, by category.

    To be right under teacher forcing an answer's every token must be the likeliest after those before it, so that it
    is what greedy decoding says.
    """
    right: dict[str, list[bool]] = {category: [] for category in CATEGORIES}
    random = np.random.default_rng(0)
    for batch in batches(0, scenes, held_out=True):
        asked = collate([ask(tokenizer, scene, random) for scene in batch])
        features = seen(learner, collate([look(scene) for scene in batch]))
        with torch.inference_mode():
            _, said = learner.answer(features, EVERYWHERE.expand(len(batch), -1), asked, jitter=False)
        answer = asked.targets != IGNORED
        scene, _ = answer.nonzero(as_tuple=True)
        keys = zip(scene.tolist(), asked.question[answer].tolist(), asked.category[answer].tolist(), strict=True)
        answers: dict[tuple[int, int, int], bool] = {}
        for key, good in zip(keys, said.tolist(), strict=True):
            answers[key] = answers.get(key, True) and good
        for (_, _, category), good in answers.items():
            right[CATEGORIES[category]].append(good)
    return {category: sum(found) / max(len(found), 1) for category, found in right.items()}


if __name__ == "__main__":
    app()
