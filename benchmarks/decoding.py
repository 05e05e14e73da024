"""What images of others cost an answer that is being written:  python benchmarks/decoding.py

Two real servers of a LLaVA-1.5 of real geometry with random weights, stock vLLM and the plugin. A client reads the
answer to a text, token by token, while another sends requests with one new image each, one after the other. How long
the first waits for each token is what the engine does meanwhile: encoding, deciding, the prefill of the other's prompt.
Writes ``decoding.json``.
"""

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from common import RESULTS, about, scene
from geometry import LANGUAGE_MODELS, make_geometry
from large import seconds
from rich.console import Console
from rich.table import Table
from serving import FLAGS, TOKENS, servers

from eadaprune_vllm.demo.server import Server
from eadaprune_vllm.tools.evaluate import exactly

ALONE = 30  # tokens


@contextmanager
def answer(server: Server) -> Iterator[Iterator[str]]:
    """An answer to a text, chunk by chunk, for as long as anyone wants to read."""
    body = {"model": server.NAME, "prompt": "Once upon a time", "max_tokens": 3000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=600) as response:
        response.raise_for_status()
        yield (line for line in response.iter_lines() if line.startswith("data: {"))


def wait(chunks: Iterator[str]) -> float:
    """For how many seconds there is no next one."""
    start = time.perf_counter()
    next(chunks)
    return time.perf_counter() - start


def waits(server: Server, images: list[Path], options: dict[str, Any] | None) -> dict[str, float]:
    """How many seconds tokens of the answer are waited for, before images come and while they come, and how long their
    requests take."""
    with answer(server) as chunks, ThreadPoolExecutor(1) as pool:
        wait(chunks)
        alone = statistics.median(wait(chunks) for _ in range(ALONE))
        sent = pool.submit(lambda: [seconds(server, image, options) for image in images])
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
    images: Annotated[int, typer.Option(help="Sent by each contender in a round.")] = 8,
    rounds: Annotated[int, typer.Option(help="How often each contender has its turn.")] = 3,
    share: Annotated[float, typer.Option(help="Of the tokens that are kept.")] = 0.22,
    language_model: Annotated[str, typer.Option(help=f"One of {', '.join(LANGUAGE_MODELS)}.")] = "1b",
    flags: Annotated[str, typer.Option(help="More flags for both servers, separated by spaces.")] = "",
    output: Annotated[Path, typer.Option(help="Folder that takes the result.")] = RESULTS,
) -> None:
    seeds, found = itertools.count(), dict[str, list[dict[str, float]]]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_geometry(folder / "model", language_model)

        def new() -> Path:
            path = folder / f"{next(seeds)}.png"
            scene(int(path.stem)).save(path)
            return path

        with servers(folder, folder / "model", flags.split()) as (stock, pruned):
            contenders: dict[str, tuple[Server, dict[str, Any] | None]] = {
                "stock": (stock, None),
                "energy 1": (pruned, {"energy": 1.0}),
                f"{share:.0%}": (pruned, exactly(round(share * TOKENS))),
            }
            for turn in range(rounds + 1):
                for contender, (server, options) in contenders.items():
                    row = waits(server, [new() for _ in range(images)], options)
                    if turn:  # the first time takes longer
                        found.setdefault(contender, []).append(row)
    table = Table(title=f"Seconds, median of {rounds} rounds: what an answer waits for its tokens while images come")
    for heading in ("", "without images", "longest", "lost per image", "image's request"):
        table.add_column(heading, justify="right" if heading else "left")
    for contender, rows in found.items():
        table.add_row(contender, *(f"{statistics.median(row[key] for row in rows):.3f}" for key in rows[0]))
    Console().print(table)
    settings = {"images": images, "flags": [*FLAGS, *flags.split()], "language_model": language_model}
    output.mkdir(exist_ok=True)
    (output / "decoding.json").write_text(json.dumps({"about": about() | settings, "rounds": found}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
