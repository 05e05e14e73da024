"""Embedding servers, with and without the plugin:  python benchmarks/embeddings.py

So many requests at a time, each with an image of its own, while another client sends text, one request after the other:
does text wait for images? In turns on both servers. Random weights of the embedded model's small sibling: this is about
who waits for whom, not about what embeddings say. Writes ``embeddings.json``.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from common import RESULTS, about, scene
from rich.console import Console
from rich.table import Table

from eadaprune_vllm.core.draw import data_url
from eadaprune_vllm.demo.model import make_model
from eadaprune_vllm.demo.server import DTYPE, Server

FLAGS = [
    "--runner",
    "pooling",
    "--load-format",
    "dummy",
    "--enforce-eager",
    "--max-model-len",
    "2048",
    "--dtype",
    DTYPE,
]
SERVERS = {"stock": [], "pruning": ["--plugin", "eadaprune"]}


def embed(server: Server, **body: Any) -> float:
    """How many seconds one request takes."""
    start = time.perf_counter()
    response = httpx.post(f"{server.url}/v1/embeddings", json={"model": server.NAME} | body, timeout=600)
    response.raise_for_status()
    return time.perf_counter() - start


def embed_image(server: Server, number: int) -> float:
    part = {"type": "image_url", "image_url": {"url": data_url(scene(number))}}
    return embed(server, messages=[{"role": "user", "content": [part]}])


def texts_meanwhile(server: Server, images: list[Future[float]]) -> Iterator[float]:
    """How many seconds each text takes, as long as there are images."""
    while wait(images, 0).not_done:
        yield embed(server, input="Hello")


def measure(server: Server, first: int, images: int, at_once: int) -> dict[str, float]:
    """One round, with images of these numbers."""
    start = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        asked = [pool.submit(embed_image, server, number) for number in range(first, first + images)]
        texts = list(texts_meanwhile(server, asked))
        took = [each.result() for each in asked]
    return {
        "images_per_second": images / (time.perf_counter() - start),
        "median_image_seconds": statistics.median(took),
        "median_text_seconds": statistics.median(texts),
        "longest_text_seconds": max(texts),
    }


def main(
    images: Annotated[int, typer.Option(help="Images of a round.")] = 100,
    at_once: Annotated[int, typer.Option(help="Requests with images at a time.")] = 16,
    rounds: Annotated[int, typer.Option(help="Rounds on each server.")] = 5,
    output: Annotated[Path, typer.Option(help="Folder that takes the results.")] = RESULTS,
) -> None:
    found: dict[str, list[dict[str, float]]] = {name: [] for name in SERVERS}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        model = Path(folder, "model")
        make_model(model)
        servers = {
            name: stack.enter_context(Server(Path(folder, name), model, *FLAGS, *flags))
            for name, flags in SERVERS.items()
        }
        for turn in range(rounds + 1):
            for name, server in servers.items():
                measured = measure(server, images * turn, images, at_once)
                if turn:  # the first time takes longer
                    found[name].append(measured)
    table = Table("", *(f"{name} (median of {rounds})" for name in SERVERS))
    for key in found["stock"][0]:
        table.add_row(key, *(f"{statistics.median(each[key] for each in found[name]):.3g}" for name in SERVERS))
    Console().print(table)
    settings = {"images": images, "at_once": at_once, "flags": FLAGS}
    (output / "embeddings.json").write_text(json.dumps({"about": about() | settings, "rounds": found}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
