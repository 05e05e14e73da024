"""Trains the embedded model:  python benchmarks/training/train.py OUTPUT

A LLaVA-1.5 of a few million parameters learns to answer questions about generated scenes
(``eadaprune_vllm.demo.scenes``). On 2 CPU cores, under two hours. What it learns from:

- the answers, of all questions about a scene at once: each sees the image and itself
- for each patch, what it shows, in which colour and where, which letters, and whether it is the middle of something;
  for the CLS token, what the scene has. CLIP's tower comes with such knowledge from its own training. These heads are
  thrown away.

The tower learns alone first. It sees windows of a quarter of a scene, where things and places are what they are in the
whole; the whole comes last.
No token is ever pruned while training. The positions of image tokens in the language model are scaled at random, so
that it learns places from features rather than from how many tokens came before.
"""

import json
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
import typer
from data import GRID, IGNORED, Scenes, collate, make_tokenizer
from learner import Learner
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from eadaprune_vllm.demo.model import save_model
from eadaprune_vllm.demo.questions import CATEGORIES


@dataclass(frozen=True)
class Stage:
    """A part of the training.

    Attributes:
        side: of the windows that it sees, in patches.
        batch: scenes per step.
        steps: how many.
        answers: whether questions are asked.
    """

    side: int
    batch: int
    steps: int
    answers: bool


STAGES = (Stage(12, 48, 1800, False), Stage(12, 48, 1000, True), Stage(GRID, 16, 300, True))
RATE, WARM_UP, WEIGHT_DECAY = 1.5e-3, 100, 0.02
COOLING = 0.3  # share of all steps over which the rate falls to zero


def accuracy(learner: Learner, tokenizer: PreTrainedTokenizerFast, scenes: int) -> dict[str, float]:
    """Share of questions about held-out scenes that are answered right, word for word, by category; and of the patches
    of things, those that the tower names right.

    To be right under teacher forcing an answer's every token must be the likeliest after those before it, so that it
    is what greedy decoding says.
    """
    loader = DataLoader(Scenes(tokenizer, 0, GRID, held_out=True), batch_size=16, collate_fn=collate)
    right: dict[str, list[bool]] = {category: [] for category in (*CATEGORIES, "patches")}
    for batch in islice(loader, scenes // 16):
        with torch.inference_mode():
            features, _, named = learner.see(batch)
            _, said = learner.answer(features, batch, jitter=False)
        right["patches"] += named.tolist()
        asked = batch.targets != IGNORED
        scene, _ = asked.nonzero(as_tuple=True)
        keys = zip(scene.tolist(), batch.question[asked].tolist(), batch.category[asked].tolist(), strict=True)
        answers: dict[tuple[int, int, int], bool] = {}
        for key, good in zip(keys, said.tolist(), strict=True):
            answers[key] = answers.get(key, True) and good
        for (_, _, category), good in answers.items():
            right[CATEGORIES[category]].append(good)
    return {category: sum(found) / max(len(found), 1) for category, found in right.items()}


def main(
    output: Annotated[Path, typer.Argument(help="Folder that takes the model; must not exist.")],
    scale: Annotated[float, typer.Option(help="Share of the steps to take, for a try.")] = 1.0,
    threads: Annotated[int, typer.Option(help="Results depend on it in the last digits.")] = 2,
) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    tokenizer = make_tokenizer()
    learner = Learner(tokenizer)
    parameters = sum(weight.numel() for weight in learner.llava.parameters())
    print(f"{parameters / 1e6:.2f}M parameters, {len(tokenizer)} tokens", flush=True)
    decayed = [weight for weight in learner.parameters() if weight.ndim > 1]
    others = [weight for weight in learner.parameters() if weight.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.98)
    )
    stages = [(stage, round(stage.steps * scale)) for stage in STAGES]
    total, done, seed, start = sum(steps for _, steps in stages), 0, 0, time.monotonic()
    shown: dict[str, float] = {}
    for stage, steps in stages:
        # One worker, so that the order of scenes is always the same.
        loader = iter(
            DataLoader(
                Scenes(tokenizer, seed, stage.side),
                batch_size=stage.batch,
                collate_fn=collate,
                num_workers=1,
                prefetch_factor=8,
            )
        )
        for _ in range(steps):
            rate = RATE * min(1.0, (done + 1) / WARM_UP, (total - done) / (COOLING * total))
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = next(loader)
            features, losses, named = learner.see(batch)
            rights = {"named": named}
            if stage.answers:
                more, rights["said"] = learner.answer(features, batch, jitter=True)
                losses |= more
            torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            for name, value in (losses | {name: found.float().mean() for name, found in rights.items()}).items():
                latest = float(value.detach())
                shown[name] = 0.95 * shown.get(name, latest) + 0.05 * latest
            if done % 50 == 0:
                seconds = time.monotonic() - start
                print(f"{done}/{total} {seconds:.0f}s", {k: round(v, 3) for k, v in shown.items()}, flush=True)
        seed += stage.batch * steps
        print(f"after {stage}:", accuracy(learner, tokenizer, 128), flush=True)
    minutes = (time.monotonic() - start) / 60
    save_model(learner.llava, tokenizer, output)
    found = {
        "minutes": minutes,
        "parameters": parameters,
        "scenes": seed,
        "accuracy": accuracy(learner, tokenizer, 512),
    }
    (output / "training.json").write_text(json.dumps(found, indent=1) + "\n")
    print(found)


if __name__ == "__main__":
    typer.run(main)
