"""Trains the embedded model:  python benchmarks/training/train.py OUTPUT

A LLaVA-1.5 of a few million parameters learns to answer questions about generated scenes
(``eadaprune_vllm.demo.scenes``). On 2 CPU cores, in bfloat16, under two hours. What it learns from:

- the answers, of all questions about a scene at once: each sees the image and itself
- for each patch, what it shows and in which colour; for the CLS token, what the scene has. CLIP's tower comes with
  such knowledge from its own training. These heads are thrown away.

First it sees windows of a quarter of a scene, where things and places are what they are in the whole; then the whole.
No token is ever pruned while training. The positions of image tokens in the language model are scaled at random, so
that it learns places from features rather than from how many tokens came before.
"""

import json
import math
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
    """

    side: int
    batch: int
    steps: int


STAGES = (Stage(12, 48, 1200), Stage(GRID, 16, 1100))
RATE, WARM_UP, DECAY = 1.5e-3, 100, 0.02


def accuracy(learner: Learner, tokenizer: PreTrainedTokenizerFast, scenes: int) -> dict[str, float]:
    """Share of questions about held-out scenes that are answered right, word for word, by category.

    To be right under teacher forcing an answer's every token must be the likeliest after those before it, so that it
    is what greedy decoding says.
    """
    loader = DataLoader(Scenes(tokenizer, 0, GRID, held_out=True), batch_size=16, collate_fn=collate)
    right: dict[str, list[bool]] = {category: [] for category in CATEGORIES}
    for batch in islice(loader, scenes // 16):
        with torch.inference_mode():
            _, said = learner(batch, jitter=False)
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
    # What learns is float32, what computes a bfloat16 copy of it: autocast would copy every activation, twice.
    masters = [weight.detach().clone() for weight in learner.parameters()]
    weights = list(learner.to(torch.bfloat16).parameters())
    decayed = [master for master in masters if master.ndim > 1]
    others = [master for master in masters if master.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.98)
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
            rate = RATE * min(1.0, (done + 1) / WARM_UP) * (0.02 + 0.98 * (1 + math.cos(math.pi * done / total)) / 2)
            for group in optimizer.param_groups:
                group["lr"] = rate
            losses, said = learner(next(loader), jitter=True)
            torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
            for master, weight in zip(masters, weights, strict=True):
                master.grad, weight.grad = None if weight.grad is None else weight.grad.float(), None
            torch.nn.utils.clip_grad_norm_(masters, 1.0)
            optimizer.step()
            with torch.no_grad():
                for master, weight in zip(masters, weights, strict=True):
                    weight.copy_(master)
            done += 1
            for name, value in (losses | {"right": said.float().mean()}).items():
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
