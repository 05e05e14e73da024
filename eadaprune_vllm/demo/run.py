"""The demonstration: the embedded model behind a real server, real requests, a table and pictures."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import skimage.data
from openai import OpenAI
from PIL import Image
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from eadaprune_vllm.demo.server import Server
from eadaprune_vllm.draw import data_url, picture
from eadaprune_vllm.report import ItemPreview
from eadaprune_vllm.tools.plots import caption, explanation

THRESHOLDS = (1.0, 0.999, 0.99, 0.95)
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "page")
FLAGS = ("--plugin", "eadaprune", "--enforce-eager", "--max-model-len", "2048", "--dtype", "bfloat16")


@dataclass(frozen=True)
class Answer:
    """What the server said of one image at one threshold.

    Attributes:
        report: the field ``eadaprune`` of the answer.
        first_token_seconds: from request to the first chunk of the stream.
        preview: what the preview endpoint says of the same request.
    """

    report: dict[str, Any]
    first_token_seconds: float
    preview: ItemPreview


def run_demo(model: Path, output: Path, console: Console) -> None:
    """Serve ``model`` (as made by ``demo_model``), print a table of what was saved, write pictures to ``output``.

    Raises:
        RuntimeError: if the server does not start, or contradicts itself.
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
    for name in images:
        previews = [answers[name, energy].preview for energy in THRESHOLDS]
        panels = [(caption(preview), picture(preview.overlay or "")) for preview in previews]
        explanation(panels, previews[0].curve, previews[1:]).savefig(output / f"{name}.png")
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
    """One streamed chat request through the OpenAI SDK, and a preview of the same request.

    Raises:
        RuntimeError: if the two do not agree.
    """
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    content: list[Any] = [
        {"type": "image_url", "image_url": {"url": data_url(image)}},
        {"type": "text", "text": "What is in this picture?"},
    ]
    messages: list[Any] = [{"role": "user", "content": content}]
    options = {"eadaprune": {"energy": energy}}
    start = time.perf_counter()
    stream = client.chat.completions.create(
        model=server.NAME, messages=messages, max_tokens=8, stream=True, extra_body=options
    )
    report: dict[str, Any] = (next(iter(stream)).model_extra or {})["eadaprune"]
    first_token = time.perf_counter() - start
    for _ in stream:
        pass
    body = options | {"messages": messages, "overlay": True}
    (found,) = httpx.post(f"{server.url}/v1/eadaprune/preview", json=body, timeout=60).json()["images"]
    preview = ItemPreview.model_validate(found)
    if preview.kept_tokens != report["kept_tokens"]:
        raise RuntimeError(f"{report['kept_tokens']} tokens were kept, but the preview says {preview.kept_tokens}")
    return Answer(report, first_token, preview)


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
            str(answer.report["visual_tokens"]),
            str(answer.report["kept_tokens"]),
            f"{answer.report['kept_tokens'] / answer.report['visual_tokens']:.0%}",
            f"{answer.report['kv_cache_bytes_saved'] / 1024:.0f} KiB",
            f"{answer.first_token_seconds * 1000:.0f} ms",
        )
        last = name
    return found
