"""What pruning gains on a GPU server, by a simulated accelerator:  python benchmarks/simulate.py

No figure of this benchmark is a measurement of a GPU: the device is a model (``accelerator.py``), with the times of its
parameters. What it shows is how well host and device overlap: whether the engine waits, and for what.

Servers in turns, each under loads of 1, 16 and 64 concurrent requests with new images: stock vLLM; the plugin at
``energy`` 1.0; the plugin with at most 22 % of the tokens, by the spectrum and by span; with decisions that take no
time, the ideal; and with an engine that waits for each decision, as on a CPU. Writes ``simulated.json``.
"""

import itertools
import json
import os
import random
import statistics
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from accelerator import ENVIRONMENT, IDEAL, VOCABULARY, WAITS, Rates
from common import RESULTS, Output, save, show
from geometry import IMAGE_TOKENS, make_geometry
from rich.console import Console
from servers import Contender
from serving import COLUMNS as SERVING_COLUMNS
from serving import Cell, bench

from eadaprune_vllm.demo.server import Server

ENTRY_POINT = "[vllm.general_plugins]\nsimulated = accelerator:register\n"
SHARE = 0.22
FLAGS = ["--load-format", "dummy", "--max-model-len", "2048", "--max-num-seqs", "128", "--dtype", "bfloat16"]
FLAGS += ["--async-scheduling", "--enforce-eager", "--no-enable-prefix-caching"]
FLAGS += ["--max-num-batched-tokens", "8192"]  # as by default on an H100
FLAGS += ["--kv-cache-memory-bytes", "1000000000"]
COLUMNS = SERVING_COLUMNS | {"p99_first_token": "p99_ttft_ms", "p99_between_tokens": "p99_itl_ms"}


def environment(folder: Path, rates: Rates, plugins: str) -> dict[str, str]:
    """Of a server with the simulated accelerator: the entry point is found beside the script."""
    info = folder / "simulated-0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "entry_points.txt").write_text(ENTRY_POINT)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: simulated\nVersion: 0\n")
    paths = [str(folder), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"PYTHONPATH": os.pathsep.join(paths), "VLLM_PLUGINS": plugins, ENVIRONMENT: json.dumps(asdict(rates))}
    return dict(os.environ) | own | {"HF_HUB_OFFLINE": "1"}


def main(
    concurrency: Annotated[list[int], typer.Option(help="Requests at a time.")] = [1, 16, 64],  # noqa: B006
    rounds: Annotated[int, typer.Option(help="How often each server has its turn.")] = 3,
    output_tokens: Annotated[int, typer.Option(help="Tokens of every answer.")] = 16,
    slower: Annotated[float, typer.Option(help="How many times as long as an H100 the device takes.")] = 4,
    only: Annotated[list[str], typer.Option(help="Contenders to run; by default all.")] = [],  # noqa: B006
    output: Output = RESULTS,
) -> None:
    console, seeds, runs = Console(), itertools.count(), list[dict[str, Any]]()
    rates, kept = Rates().slower(slower), round(SHARE * IMAGE_TOKENS)
    # The threshold asks for more than the share, so that all keep the same number, whatever the picture.
    pruned = {"energy": 0.9999, "min_tokens": 1, "max_tokens": kept}
    both, by_span = "simulated,eadaprune", ["--eadaprune-budget", "span"]
    servers: dict[str, tuple[str, list[str], str, list[tuple[str, dict[str, Any] | None]]]] = {
        "stock": ("simulated", [], "", [("stock", None)]),
        "spectrum": (both, [], "", [("energy 1", {"energy": 1.0}), ("spectrum", pruned)]),
        "span": (both, by_span, "", [("span", pruned)]),
        "ideal": (both, [], IDEAL, [("ideal", pruned)]),
        "spectrum, waiting": (both, [], WAITS, [("spectrum, waiting", pruned)]),
        "span, waiting": (both, by_span, WAITS, [("span, waiting", pruned)]),
    }
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        make_geometry(folder / "model", "wide", VOCABULARY)
        contenders = []
        for server, (plugins, flags, variable, own) in servers.items():
            if only and not any(each in only for each, _ in own):
                continue
            env = environment(folder, rates, plugins) | ({variable: "1"} if variable else {})
            started = Server(
                folder / f"{server}.log", folder / "model", "--allowed-local-media-path", name, *FLAGS, *flags, env=env
            )
            stack.enter_context(started)
            contenders += [Contender(each, started, options) for each, options in own if not only or each in only]
            bench(contenders[-1], Cell(1, 4, 16), folder, seeds, output_tokens, COLUMNS)
        for turn, at_once in itertools.product(range(rounds), concurrency):
            cell = Cell(1, at_once, max(24, 4 * at_once))
            for each in random.Random(turn).sample(contenders, len(contenders)):
                with console.status(f"round {turn + 1} of {rounds}: {at_once} at a time, {each.name}"):
                    found = bench(each, cell, folder, seeds, output_tokens, COLUMNS)
                runs.append({"contender": each.name, "round": turn, "concurrency": at_once} | found)
                save(output / "simulated.json", {"rates": asdict(rates), "output_tokens": output_tokens}, runs=runs)
    report(runs)


def report(runs: list[dict[str, Any]]) -> None:
    """Medians, and requests/s beside stock's and the ideal's of the same round."""
    lines = []
    for at_once in dict.fromkeys(run["concurrency"] for run in runs):
        of_load = [run for run in runs if run["concurrency"] == at_once]
        rates = {(run["contender"], run["round"]): run["requests_per_second"] for run in of_load}
        for name in dict.fromkeys(run["contender"] for run in of_load):
            own = [run for run in of_load if run["contender"] == name]
            cells: list[object] = [at_once, name, f"{own[0]['prompt_tokens']:.0f}"]
            cells += [statistics.median(run[column] for run in own) for column in COLUMNS]
            for other in ("stock", "ideal"):
                ratios = [
                    rate / rates[other, turn]
                    for (each, turn), rate in rates.items()
                    if each == name and (other, turn) in rates
                ]
                cells.append(
                    f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""
                )
            lines.append(cells)
    headings = [
        "at a time",
        "server",
        "prompt",
        *(column.replace("_", " ") for column in COLUMNS),
        "x stock",
        "of the ideal",
    ]
    show("Simulated accelerator: medians", headings, lines)


if __name__ == "__main__":
    typer.run(main)
