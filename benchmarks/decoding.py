"""How long a streamed answer waits while images of other requests come:  python benchmarks/decoding.py

Stock vLLM and the plugin, with a LLaVA-1.5 of real geometry and random weights. One client reads a long answer to a
text, token by token. Meanwhile another sends requests with one new image each, one after the other. What the first
client waits for a token is what the engine does in between: encoding, the decision, the prefill of the other request.
Writes ``decoding.json``.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from common import RESULTS, Flags, Output, save, scene, show_medians
from geometry import IMAGE_TOKENS, LANGUAGE_MODELS, make_geometry
from openai import OpenAI
from servers import FLAGS, Contender, ask, contenders, in_turns, stock_and_plugin

from eadaprune_vllm.demo.server import Server

ALONE = 30  # tokens that are timed before images come


@contextmanager
def answer(server: Server) -> Iterator[Iterator[object]]:
    """A long answer to a text, token by token; it is aborted at the end of the ``with`` block."""
    body = {"ignore_eos": True}
    with (
        OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=600) as client,
        client.completions.create(
            model=server.NAME, prompt="Once upon a time", max_tokens=3000, stream=True, extra_body=body
        ) as chunks,
    ):
        yield iter(chunks)


def wait(chunks: Iterator[object]) -> float:
    """Seconds until the next token."""
    start = time.perf_counter()
    next(chunks)
    return time.perf_counter() - start


def waits(contender: Contender, images: list[Path]) -> dict[str, float]:
    """Seconds that the answer waits for a token: ``alone``, the median without images; ``longest``, while these images
    come; ``lost_per_image``. And ``request``, the median that a request with an image takes."""
    with answer(contender.server) as chunks, ThreadPoolExecutor(1) as pool:
        wait(chunks)
        alone = statistics.median(wait(chunks) for _ in range(ALONE))
        sent = pool.submit(lambda: [ask(contender.server, path.as_uri(), contender.options).seconds for path in images])
        meanwhile = []
        while not sent.done():
            meanwhile.append(wait(chunks))
        return {
            "alone": alone,
            "longest": max(meanwhile),
            "lost_per_image": (sum(meanwhile) - alone * len(meanwhile)) / len(images),
            "request": statistics.median(sent.result()),
        }


def main(
    images: Annotated[int, typer.Option(help="Images of a round, for each contender.")] = 8,
    rounds: Annotated[int, typer.Option(help="How often each contender has its turn.")] = 3,
    share: Annotated[float, typer.Option(help="Share of an image's tokens that is kept.")] = 0.22,
    language_model: Annotated[str, typer.Option(help=f"One of {', '.join(LANGUAGE_MODELS)}.")] = "1b",
    flags: Flags = "",
    output: Output = RESULTS,
) -> None:
    seeds, own = itertools.count(), [*FLAGS, *flags.split()]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_geometry(folder / "model", language_model)

        def measure(contender: Contender) -> dict[str, float]:
            new = [folder / f"{next(seeds)}.png" for _ in range(images)]
            for path in new:
                scene(int(path.stem)).save(path)
            return waits(contender, new)

        with stock_and_plugin(folder, folder / "model", own) as both:
            kept = {f"{share:.0%}": round(share * IMAGE_TOKENS)}
            found = in_turns(contenders(*both, kept), rounds, measure)
    title = f"Seconds that an answer waits for a token while images come, median of {rounds} rounds"
    show_medians(title, found, ["alone", "longest", "lost_per_image", "request"])
    save(output / "decoding.json", {"images": images, "flags": own, "language_model": language_model}, rounds=found)


if __name__ == "__main__":
    typer.run(main)
