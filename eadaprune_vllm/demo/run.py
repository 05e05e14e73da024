"""The demonstration: the embedded model behind a real server, real requests, a table and pictures."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import skimage.data
import torch
from openai import OpenAI
from PIL import Image
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from eadaprune_vllm.demo.server import Server, total
from eadaprune_vllm.draw import data_url, dim_pruned, row
from eadaprune_vllm.local import LocalEncoder
from eadaprune_vllm.options import PruneOptions

THRESHOLDS = (1.0, 0.999, 0.99, 0.95)
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "page")
FLAGS = ("--plugin", "eadaprune", "--enforce-eager", "--max-model-len", "2048", "--dtype", "bfloat16")


@dataclass(frozen=True)
class Answer:
    """What the server and its metrics said of one request."""

    visual_tokens: int
    kept_tokens: int
    kv_bytes_saved: int
    first_token_seconds: float


def run_demo(model: Path, output: Path, console: Console) -> None:
    """Serve ``model`` (as made by ``demo_model``), print a table of what was saved, write pictures to ``output``.

    Raises:
        RuntimeError: if the server does not start, or contradicts what this process computes.
    """
    output.mkdir(parents=True, exist_ok=True)
    images = demo_images()
    spinner = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*spinner, console=console, transient=True) as progress:
        step = progress.add_task("Starting vllm serve with the plugin (half a minute)")
        with Server(output / "server.log", model, *FLAGS) as server:
            answers = {}
            ask(server, Image.new("RGB", (336, 336)), 1.0)  # the first request of a server pays for its warm-up
            for name, image in images.items():
                for energy in THRESHOLDS:
                    progress.update(step, description=f"Asking about {name} at energy {energy}")
                    answers[name, energy] = ask(server, image, energy)
            progress.update(step, description="Stopping the server")
        progress.update(step, description="Drawing what was kept")
        local = LocalEncoder(model, torch.bfloat16)
        for name, image in images.items():
            draw(local, image, {energy: answers[name, energy] for energy in THRESHOLDS}).save(output / f"{name}.png")
    console.print(table(answers))
    console.print(
        "Random weights: the counts and bytes are real, the answers mean nothing, and the language model is too "
        "small for times to say much.\n"
        f"Pictures of the kept patches: {output}/*.png; the server's log: {output}/server.log"
    )


def demo_images() -> dict[str, Image.Image]:
    """Photographs that come with scikit-image, and the two extremes: nothing to see, and nothing but noise."""
    images = {name: Image.fromarray(getattr(skimage.data, name)()).convert("RGB") for name in PHOTOS}
    noise = np.random.default_rng(0).integers(0, 256, (336, 336, 3), dtype=np.uint8)
    return {"flat": Image.new("RGB", (400, 300), (90, 120, 200)), **images, "noise": Image.fromarray(noise)}


def ask(server: Server, image: Image.Image, energy: float) -> Answer:
    """One streamed chat request through the OpenAI SDK, and how it moved the server's metrics."""
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    before = server.samples()
    start = time.perf_counter()
    stream = client.chat.completions.create(
        model=server.NAME,
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": data_url(image)}},
                    {"type": "text", "text": "What is in this picture?"},
                ],
            }
        ],
        max_tokens=8,
        stream=True,
        extra_body={"mm_processor_kwargs": {"eadaprune": {"energy": energy}}},
    )
    next(iter(stream))
    first_token = time.perf_counter() - start
    for _ in stream:
        pass
    after = server.samples()

    def counted(name: str, **labels: str) -> int:
        return round(total(after, name, **labels) - total(before, name, **labels))

    return Answer(
        visual_tokens=counted("eadaprune_visual_tokens_total", stage="encoded"),
        kept_tokens=counted("eadaprune_visual_tokens_total", stage="kept"),
        kv_bytes_saved=counted("eadaprune_kv_cache_bytes_saved_total"),
        first_token_seconds=first_token,
    )


def draw(local: LocalEncoder, image: Image.Image, answers: dict[float, Answer]) -> Image.Image:
    """What the tower sees of the image, and what each threshold keeps of it, decided again in this process."""
    picture = local.seen(image)
    panels = [("what the tower sees", picture)]
    for energy, answer in answers.items():
        kept = local.prune(image, PruneOptions(energy=energy))
        if len(kept) != answer.kept_tokens:
            raise RuntimeError(f"the server kept {answer.kept_tokens} tokens where this process keeps {len(kept)}")
        caption = f"energy {energy}: {len(kept)} of {kept.num_tokens} tokens"
        panels.append((caption, dim_pruned(picture, kept.indices.tolist(), side=local.spec.grid)))
    return row(panels)


def table(answers: dict[tuple[str, float], Answer]) -> Table:
    """One line per image and threshold."""
    found = Table(title="Per-image budgets on stock vLLM")
    for column in ("image", "threshold", "tokens before", "after", "kept", "KV cache saved", "first token"):
        found.add_column(column, justify="left" if column == "image" else "right")
    last = None
    for (name, energy), answer in answers.items():
        if last not in (None, name):
            found.add_section()
        found.add_row(
            name if name != last else "",
            f"{energy:g}",
            str(answer.visual_tokens),
            str(answer.kept_tokens),
            f"{answer.kept_tokens / answer.visual_tokens:.0%}",
            f"{answer.kv_bytes_saved / 1024:.0f} KiB",
            f"{answer.first_token_seconds * 1000:.0f} ms",
        )
        last = name
    return found
