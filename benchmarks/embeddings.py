"""Embedding servers, stock vLLM and the plugin:  python benchmarks/embeddings.py

Many requests at a time embed one new image each. Meanwhile another client embeds texts, one after the other: do texts
wait for images? The model is small and has random weights: this is about who waits for whom, not about what embeddings
say. Writes ``embeddings.json``.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from common import RESULTS, Output, save, scene, show_medians
from servers import Contender, in_turns, stock_and_plugin

from eadaprune_vllm.core.draw import data_url
from eadaprune_vllm.demo.model import make_model
from eadaprune_vllm.demo.server import DTYPE, Server

FLAGS = ["--runner", "pooling", "--load-format", "dummy", "--enforce-eager", "--max-model-len", "2048"]
FLAGS += ["--dtype", DTYPE]


def embed(server: Server, **body: Any) -> float:
    """Seconds that one request takes."""
    start = time.perf_counter()
    response = httpx.post(f"{server.url}/v1/embeddings", json={"model": server.NAME} | body, timeout=600)
    response.raise_for_status()
    return time.perf_counter() - start


def embed_image(server: Server, seed: int) -> float:
    """Seconds that a request with the image of this seed takes."""
    part = {"type": "image_url", "image_url": {"url": data_url(scene(seed))}}
    return embed(server, messages=[{"role": "user", "content": [part]}])


def texts_meanwhile(server: Server, images: list[Future[float]]) -> Iterator[float]:
    """Seconds that each text takes, as long as images are pending."""
    while wait(images, 0).not_done:
        yield embed(server, input="Hello")


def measure(server: Server, seeds: list[int], at_once: int) -> dict[str, float]:
    """One round: an image for each seed, ``at_once`` of them at a time."""
    start = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        pending = [pool.submit(embed_image, server, seed) for seed in seeds]
        texts = list(texts_meanwhile(server, pending))
        seconds = [each.result() for each in pending]
    return {
        "images_per_second": len(seeds) / (time.perf_counter() - start),
        "median_image_seconds": statistics.median(seconds),
        "median_text_seconds": statistics.median(texts),
        "longest_text_seconds": max(texts),
    }


def main(
    images: Annotated[int, typer.Option(help="Images of a round.")] = 100,
    at_once: Annotated[int, typer.Option(help="Requests with images at a time.")] = 16,
    rounds: Annotated[int, typer.Option(help="Rounds on each server.")] = 5,
    output: Output = RESULTS,
) -> None:
    seeds = itertools.count()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model")
        with stock_and_plugin(folder, folder / "model", FLAGS, env={}) as (stock, plugin):
            found = in_turns(
                [Contender("stock", stock), Contender("pruning", plugin)],
                rounds,
                lambda each: measure(each.server, list(itertools.islice(seeds, images)), at_once),
            )
    show_medians(f"Median of {rounds} rounds, {at_once} images at a time", found, list(found["stock"][0]))
    save(output / "embeddings.json", {"images": images, "at_once": at_once, "flags": FLAGS}, rounds=found)


if __name__ == "__main__":
    typer.run(main)
