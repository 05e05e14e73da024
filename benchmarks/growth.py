"""How cost per image and a front end's memory grow:  python benchmarks/growth.py

Real servers of a small model with random weights: with one API server, with two that ask the same engine, and without
vLLM's processor cache, which keeps placeholders of every image it has seen up to a limit. Every image is a new one.

- cost: what encoding and pruning take per image in the engine, and how many images are served per second, at several
  concurrencies and images per request
- memory: of a single front end, over ten thousand requests

Writes ``growth.json`` and ``growth.png``.
"""

import itertools
import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import matplotlib

matplotlib.use("Agg")
import psutil
import typer
from common import RESULTS, about
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table
from serving import STAGES, Bench, Cell, stages

from eadaprune_vllm.demo.model import make_model
from eadaprune_vllm.demo.server import Server

FLAGS = ["--plugin", "eadaprune", "--max-model-len", "4096", "--limit-mm-per-prompt", '{"image": 4}']
FLAGS += ["--dtype", "float32"]  # not every CPU has instructions for bfloat16
SERVERS = {
    "1 API server": ["--api-server-count", "1"],
    "2 API servers": ["--api-server-count", "2"],
    "no processor cache": ["--mm-processor-cache-gb", "0"],
}
WATCHED = ("1 API server", "no processor cache")
CONCURRENCY, IMAGES = (1, 4, 16), (1, 4)


def watch(bench: Bench, server: Server, requests: int, console: Console) -> list[tuple[int, float]]:
    """How many requests there were, and MiB resident in the front end, at the start and after each tenth of them."""
    found = []
    for part in range(11):
        if part:
            bench.run(server, Cell(1, 16, requests // 10), None)
        resident = psutil.Process(server.process.pid).memory_info().rss
        found.append((part * requests // 10, resident / 2**20))
        console.print(f"{found[-1][0]} requests: {found[-1][1]:.0f} MiB")
    return found


def main(
    requests: Annotated[int, typer.Option(help="Over which memory is watched.")] = 10_000,
    output: Annotated[Path, typer.Option(help="Folder that takes the results.")] = RESULTS,
) -> None:
    console, rows, memory = Console(), list[dict[str, Any]](), dict[str, list[tuple[int, float]]]()
    with tempfile.TemporaryDirectory() as name:
        folder, model = Path(name), Path(name) / "model"
        make_model(model)
        bench = Bench(folder, model, output_tokens=4)

        def serve(setting: str) -> Server:
            flags = [*FLAGS, *SERVERS[setting], "--allowed-local-media-path", name]
            return Server(folder / "log", model, *flags)

        for setting in SERVERS:
            with serve(setting) as server:
                bench.run(server, Cell(4, 16, 16), None)  # set up once, for nothing
                for images, concurrency in itertools.product(IMAGES, CONCURRENCY):
                    before = stages(server)
                    found = bench.run(server, Cell(images, concurrency, 48), None)
                    spent = {name: value - before[name] for name, value in stages(server).items()}
                    each = {stage: 1000 * spent[stage] / spent["pruned"] for stage in STAGES}
                    row = {"server": setting, "images": images, "concurrency": concurrency}
                    rows.append(row | each | {"images_per_second": found["requests_per_second"] * images})
                    console.print(rows[-1])
        for setting in WATCHED:
            with serve(setting) as server:
                bench.run(server, Cell(1, 16, 160), None)
                memory[setting] = watch(bench, server, requests, console)
    table = Table(title="Milliseconds per image in the engine")
    for heading in rows[0]:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)
    output.mkdir(exist_ok=True)
    text = json.dumps({"about": about(), "cost": rows, "memory": memory}, indent=1)
    (output / "growth.json").write_text(text + "\n")
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for setting, points in memory.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=setting)
    axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    axes.legend()
    axes.set_xlabel("requests, each with an image of its own")
    axes.set_ylabel("MiB resident in the front end")
    figure.savefig(output / "growth.png", dpi=100)


if __name__ == "__main__":
    typer.run(main)
