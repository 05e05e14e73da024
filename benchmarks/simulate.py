"""What pruning gains on a GPU server, by a simulated accelerator:  python benchmarks/simulate.py

No figure of this benchmark is a measurement of a GPU: the device is a model (``accelerator.py``), with the times of its
parameters. What it shows is how well host and device overlap: whether the engine waits, and for what.

Servers in turns: stock vLLM; the plugin at ``energy`` 1.0; the plugin with at most 22 % of the tokens, by the spectrum
and by span; with decisions that take no time, the ideal; and with an engine that waits for each decision, as on a CPU.
Each is under loads of 1, 16 and 64 concurrent requests with new images; and under a load at a fixed rate, while answers
to text are being written: how long do they wait for a token? Writes ``simulated.json``, or ``simulated-qwen.json``.
"""

import itertools
import json
import os
import random
import statistics
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from accelerator import ENVIRONMENT, IDEAL, MODELS, VOCABULARY, WAITS, Times, announce
from common import RESULTS, Output, save, show, with_range
from decoding import while_writing
from geometry import make_geometry, make_qwen
from rich.console import Console
from scipy import stats
from servers import Contender
from serving import Cell, bench

from eadaprune_vllm.demo.server import Server

BOTH = "simulated,eadaprune"
SHARE = 0.22
FLAGS = ["--load-format", "dummy", "--max-model-len", "2048", "--max-num-seqs", "128", "--dtype", "bfloat16"]
FLAGS += ["--async-scheduling", "--enforce-eager", "--no-enable-prefix-caching", "--limit-mm-per-prompt.video", "0"]
FLAGS += ["--max-num-batched-tokens", "8192"]  # as by default on an H100
FLAGS += ["--kv-cache-memory-bytes", "200000000", "--mm-processor-cache-gb", "0.1"]  # no image comes twice


@dataclass(frozen=True)
class Kind:
    """A kind of server, and the pruning options of its contenders by name.

    Attributes:
        contenders: with their options.
        plugins: vLLM's.
        flags: of the server.
        env: more variables of its environment.
    """

    contenders: dict[str, dict[str, Any] | None]
    plugins: str = BOTH
    flags: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)


def kinds(kept: int) -> list[Kind]:
    """All servers. The threshold asks for more than ``kept``, so that every picture keeps the same number of tokens."""
    options = {"energy": 0.999, "min_tokens": kept, "max_tokens": kept}
    by_span = ["--eadaprune-budget", "span"]
    return [
        Kind({"stock": None}, "simulated"),
        Kind({"energy 1": {"energy": 1.0}, "spectrum": options}),
        Kind({"span": options}, flags=by_span),
        Kind({"ideal": options}, env={IDEAL: "1"}),
        Kind({"spectrum, waiting": options}, env={WAITS: "1"}),
        Kind({"span, waiting": options}, flags=by_span, env={WAITS: "1"}),
    ]


def start(kind: Kind, folder: Path, model: str, times: Times) -> Server:
    """A server with the simulated accelerator, whose entry point is found beside this script."""
    announce(folder, "simulated", "accelerator:register")
    paths = [str(folder), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"PYTHONPATH": os.pathsep.join(paths), "VLLM_PLUGINS": kind.plugins, "HF_HUB_OFFLINE": "1"}
    own[ENVIRONMENT] = json.dumps({"model": model, "times": asdict(times)})
    log = folder / f"{next(iter(kind.contenders))}.log"
    flags = ["--allowed-local-media-path", str(folder), *FLAGS, *kind.flags]
    return Server(log, folder / "model", *flags, env=dict(os.environ) | own | kind.env)


def main(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = "llava",
    concurrency: Annotated[list[int], typer.Option(help="Requests at a time.")] = [1, 16, 64],  # noqa: B006
    writing: Annotated[int, typer.Option(help="Answers that are being written under the load at a fixed rate.")] = 4,
    rate: Annotated[float, typer.Option(help="Requests per second of that load; 0 for none.")] = 6,
    rounds: Annotated[int, typer.Option(help="How often each server has its turn, after one to warm up.")] = 4,
    output_tokens: Annotated[int, typer.Option(help="Tokens of every answer.")] = 16,
    slower: Annotated[float, typer.Option(help="How many times as long as an H100 the device takes.")] = 4,
    only: Annotated[list[str], typer.Option(help="Contenders to run; by default all.")] = [],  # noqa: B006
    output: Output = RESULTS,
) -> None:
    console, seeds, runs = Console(), itertools.count(), list[dict[str, Any]]()
    shapes = MODELS[model]
    times = shapes.times.slower(slower)
    facts = {"model": model, "times": asdict(times), "output_tokens": output_tokens, "writing": writing}
    cells = [Cell(1, each, max(24, 3 * each), side=shapes.side) for each in concurrency]
    if rate:
        cells.append(Cell(1, 64, round(10 * rate), side=shapes.side, rate=rate))
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        (make_geometry if model == "llava" else make_qwen)(folder / "model", "wide", VOCABULARY)
        contenders = []
        for kind in kinds(round(SHARE * shapes.tokens)):
            own = {name: options for name, options in kind.contenders.items() if not only or name in only}
            if not own:
                continue
            server = stack.enter_context(start(kind, folder, model, times))
            contenders += [Contender(name, server, options) for name, options in own.items()]
            bench(contenders[-1], Cell(1, 4, 16, side=shapes.side), folder, seeds, output_tokens)
        for turn, cell in itertools.product(range(rounds + 1), cells):
            for each in random.Random(turn).sample(contenders, len(contenders)):

                def load(each: Contender = each, cell: Cell = cell) -> dict[str, float]:
                    return bench(each, cell, folder, seeds, output_tokens)

                with console.status(f"round {turn} of {rounds}: {cell}, {each.name}"):
                    found = while_writing(writing, each.server, load) if cell.rate else load()
                runs.append({"contender": each.name, "round": turn, "load": cell.name} | found)
                save(output / ("simulated.json" if model == "llava" else f"simulated-{model}.json"), facts, runs=runs)
    report(runs)


def report(runs: list[dict[str, Any]]) -> None:
    """Medians, and requests/s beside stock's and the ideal's of the same round; without the first round."""
    runs = [run for run in runs if run["round"]]
    for load in dict.fromkeys(run["load"] for run in runs):
        of_load = [run for run in runs if run["load"] == load]
        columns = [name for name in of_load[0] if name not in ("contender", "round", "load")]
        columns = [name for name in columns if all(name in run for run in of_load)]
        lines: list[list[object]] = []
        for name in dict.fromkeys(run["contender"] for run in of_load):
            own = [run for run in of_load if run["contender"] == name]
            lines.append([name, *(statistics.median(run[column] for run in own) for column in columns)])
            lines[-1] += [ratio(of_load, name, other) for other in ("stock", "ideal")]
        headings = ["server", *(column.replace("_", " ") for column in columns), "x stock", "of the ideal"]
        show(f"Simulated accelerator, {load}: medians, and requests per second with 95 % intervals", headings, lines)


def ratio(runs: list[dict[str, Any]], name: str, other: str) -> str:
    """Requests per second of one contender as multiples of another's in the same round: the mean, and its 95 %
    interval, if there are enough rounds."""
    rates = {(run["contender"], run["round"]): run["requests_per_second"] for run in runs}
    ratios = [
        rate / rates[other, turn] for (each, turn), rate in rates.items() if each == name and (other, turn) in rates
    ]
    if name == other or not ratios:
        return ""
    if len(ratios) == 1:
        return f"{ratios[0]:.2f}"
    half = stats.t.ppf(0.975, len(ratios) - 1) * stats.sem(ratios)
    mean = statistics.mean(ratios)
    return with_range(mean, mean - half, mean + half)


if __name__ == "__main__":
    typer.run(main)
