"""How long answers that are being written wait while images of other requests come:  python benchmarks/decoding.py

Stock vLLM and the plugin, with a LLaVA-1.5 of real geometry and random weights. Clients read long answers to a text,
token by token. Meanwhile requests with one new image each arrive at a fixed rate. What the clients wait for a token is
what the engine does in between: encoding, the decision, the prefill of other requests. Writes ``decoding.json``.
"""

import itertools
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Annotated

import numpy as np
import typer
from common import RESULTS, Flags, Output, save, show_medians
from geometry import IMAGE_TOKENS, LANGUAGE_MODELS, make_geometry
from openai import OpenAI
from servers import FLAGS, Contender, contenders, in_turns, stock_and_plugin
from serving import Cell, bench

from eadaprune_vllm.demo.server import Server

PERCENTILES = (50, 90, 99, 100)


def write(server: Server, stop: Event) -> list[float]:
    """Read answers to a text, one after the other; returns the seconds that each token took."""
    waits: list[float] = []
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        while not stop.is_set():
            with client.completions.create(
                model=server.NAME, prompt="Once", max_tokens=1000, stream=True, extra_body={"ignore_eos": True}
            ) as chunks:
                next(iter(chunks))
                last = time.perf_counter()
                for _ in chunks:
                    now = time.perf_counter()
                    waits.append(now - last)
                    last = now
                    if stop.is_set():
                        break
    return waits


def while_writing(answers: int, server: Server, load: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Measure a load while so many answers are being written.

    Returns:
        What ``load`` returns, and percentiles of the milliseconds that the answers wait for a token.
    """
    stop = Event()
    with ThreadPoolExecutor(answers) as pool:
        written = [pool.submit(write, server, stop) for _ in range(answers)]
        try:
            found = load()
        finally:
            stop.set()
        waits = np.concatenate([each.result() for each in written])
    return found | {f"wait_p{each}": 1000 * float(np.percentile(waits, each)) for each in PERCENTILES}


def main(
    images: Annotated[int, typer.Option(help="Images of a round, for each contender.")] = 8,
    rate: Annotated[float, typer.Option(help="Images per second.")] = 0.15,
    writing: Annotated[int, typer.Option(help="Answers that are being written.")] = 1,
    rounds: Annotated[int, typer.Option(help="How often each contender has its turn.")] = 3,
    share: Annotated[float, typer.Option(help="Share of an image's tokens that is kept.")] = 0.22,
    language_model: Annotated[str, typer.Option(help=f"One of {', '.join(LANGUAGE_MODELS)}.")] = "1b",
    flags: Flags = "",
    output: Output = RESULTS,
) -> None:
    seeds, own = itertools.count(), [*FLAGS, *flags.split()]
    cell = Cell(1, images, images, rate=rate)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_geometry(folder / "model", language_model)

        def measure(contender: Contender) -> dict[str, float]:
            return while_writing(writing, contender.server, lambda: bench(contender, cell, folder, seeds, 8))

        with stock_and_plugin(folder, folder / "model", own) as both:
            kept = {f"{share:.0%}": round(share * IMAGE_TOKENS)}
            found = in_turns(contenders(*both, kept), rounds, measure)
    title = f"Milliseconds that answers wait for a token at {cell.name}, median of {rounds} rounds"
    show_medians(title, found, [*(f"wait_p{each}" for each in PERCENTILES), "first_token"])
    facts = {"images": images, "rate": rate, "writing": writing, "flags": own, "language_model": language_model}
    save(output / "decoding.json", facts, rounds=found)


if __name__ == "__main__":
    typer.run(main)
