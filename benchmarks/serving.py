"""Pruning against stock vLLM, end to end:  python benchmarks/serving.py

Two real servers on one machine, of a LLaVA-1.5 with its real tower and a language model of 1B parameters, random
weights: stock vLLM, and vLLM with this plugin. ``vllm bench serve`` sends every contender images of its own, in turns:

- ``stock``, and ``energy 1``, which keeps all tokens and asks the engine nothing: what the plugin costs
- shares of the tokens, by ``min_tokens = max_tokens``: features of random weights have no spectrum worth a threshold,
  but it is computed all the same

The limit is counted, not measured: how much less there is to compute for a prompt. Each turn also notes what the engine
spent on every new image: on encoding, spectrum and selection. Writes ``serving.json`` after each turn, and
``serving.png`` at the end. What is there already, of the same settings, is not measured again: a run of hours can be
stopped, and go on.
"""

import contextlib
import itertools
import json
import os
import random
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib

matplotlib.use("Agg")
import typer
from common import RESULTS, about, scene
from geometry import LANGUAGE_MODELS, make_geometry
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table
from transformers import LlavaConfig
from vllm.benchmarks.serve import add_cli_args
from vllm.benchmarks.serve import main as bench_serve
from vllm.utils.argparse_utils import FlexibleArgumentParser

from eadaprune_vllm.demo.server import Server
from eadaprune_vllm.tools.evaluate import exactly

TOKENS = 576
PROMPT = "What is in the picture, and where?"
FLAGS = ["--load-format", "dummy", "--max-model-len", "4096", "--limit-mm-per-prompt", '{"image": 4}']
FLAGS += ["--dtype", "float32"]  # not every CPU has instructions for bfloat16; --flags may say otherwise
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    # vLLM's engine would leave one core to its front end, which makes little use of it.
    "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
}
COLUMNS = {
    "first_token": "median_ttft_ms",
    "between_tokens": "median_tpot_ms",
    "requests_per_second": "request_throughput",
}
STAGES = ("encode", "spectrum", "select")


@dataclass(frozen=True)
class Cell:
    """One load: how many images a request has, how many requests are under way, how many are sent."""

    images: int
    concurrency: int
    requests: int


def stages(server: Server) -> dict[str, float]:
    """Seconds that each stage took so far, and of how many images and videos; zero without the plugin."""
    found = {stage: server.metric("eadaprune_stage_seconds_sum", stage=stage) for stage in STAGES}
    return found | {"pruned": server.metric("eadaprune_stage_seconds_count", stage="total")}


class Bench:
    """Sends requests, each with images never sent before."""

    def __init__(self, folder: Path, model: Path, output_tokens: int) -> None:
        self.folder, self.model, self.output_tokens = folder, model, output_tokens
        self.seeds = itertools.count()

    def run(self, server: Server, cell: Cell, options: dict[str, Any] | None) -> dict[str, float]:
        data = self.folder / "requests.jsonl"
        with data.open("w") as lines:
            for number in range(cell.requests):
                paths = [self.folder / f"{number}-{index}.png" for index in range(cell.images)]
                for path in paths:
                    scene(next(self.seeds)).save(path)
                lines.write(json.dumps({"prompt": PROMPT, "image_files": [str(path) for path in paths]}) + "\n")
        parser = FlexibleArgumentParser()
        add_cli_args(parser)
        where = ["--backend", "openai-chat", "--endpoint", "/v1/chat/completions", "--base-url", server.url]
        what = ["--model", server.NAME, "--tokenizer", str(self.model), "--ignore-eos", "--disable-tqdm"]
        what += ["--dataset-name", "custom_image", "--dataset-path", str(data), "--disable-shuffle"]
        what += ["--custom-output-len", str(self.output_tokens), "--num-prompts", str(cell.requests)]
        what += ["--max-concurrency", str(cell.concurrency), "--num-warmups", "0", "--ready-check-timeout-sec", "0"]
        body = ["--extra-body", json.dumps({"eadaprune": options})] if options else []
        before, spent_before = server.metric("vllm:prompt_tokens_total"), stages(server)
        with (self.folder / "bench.log").open("a") as log, contextlib.redirect_stdout(log):
            result = bench_serve(parser.parse_args([*where, *what, *body]))
        assert result["completed"] == cell.requests, result
        found = {name: float(result[key]) for name, key in COLUMNS.items()}
        spent = {name: value - spent_before[name] for name, value in stages(server).items()}
        if pruned := spent.pop("pruned"):
            found |= {f"{stage}_ms": 1000 * seconds / pruned for stage, seconds in spent.items()}
        return found | {"prompt_tokens": (server.metric("vllm:prompt_tokens_total") - before) / cell.requests}


def flops(config: LlavaConfig, images: int, prompt_tokens: float) -> float:
    """Multiplications and additions, two for each pair, that one prompt takes up to its first token."""

    def layers(width: int, inner: int, kv: int, gated: bool, depth: int, tokens: float, causal: bool) -> float:
        weights = width * width * 2 + width * kv * 2 + width * inner * (3 if gated else 2)
        attention = 4 * tokens * width / (2 if causal else 1)
        return depth * tokens * (2 * weights + attention)

    vision, text = config.vision_config, config.text_config
    depth = vision.num_hidden_layers + 1 + config.vision_feature_layer
    tower = layers(vision.hidden_size, vision.intermediate_size, vision.hidden_size, False, depth, TOKENS + 1, False)
    kv = text.hidden_size * text.num_key_value_heads // text.num_attention_heads
    language = layers(
        text.hidden_size, text.intermediate_size, kv, True, text.num_hidden_layers, prompt_tokens, causal=True
    )
    return images * tower + language


@contextlib.contextmanager
def servers(folder: Path, model: Path, flags: list[str]) -> Iterator[tuple[Server, Server]]:
    """Stock and pruning, both up: who does not have its turn is idle."""
    env = dict(os.environ) | ENVIRONMENT
    flags = [*FLAGS, "--allowed-local-media-path", str(folder), *flags]
    with (
        Server(folder / "stock.log", model, *flags, env=env) as stock,
        Server(folder / "pruning.log", model, *flags, "--plugin", "eadaprune", env=env) as pruned,
    ):
        yield stock, pruned


def main(
    images: Annotated[list[int], typer.Option(help="Images per request.")] = [1, 4],  # noqa: B006
    concurrency: Annotated[list[int], typer.Option(help="Requests under way.")] = [1, 4, 16],  # noqa: B006
    requests: Annotated[int, typer.Option(help="Least that a turn sends; as many as are under way, if more.")] = 4,
    share: Annotated[list[float], typer.Option(help="Of the tokens that are kept.")] = [0.5, 0.22, 0.11],  # noqa: B006
    rounds: Annotated[int, typer.Option(help="How often each contender has its turn.")] = 3,
    output_tokens: Annotated[int, typer.Option(help="Length of every answer.")] = 16,
    language_model: Annotated[str, typer.Option(help=f"One of {', '.join(LANGUAGE_MODELS)}.")] = "1b",
    flags: Annotated[str, typer.Option(help="More flags for both servers, separated by spaces.")] = "",
    output: Annotated[Path, typer.Option(help="Folder that takes the results.")] = RESULTS,
) -> None:
    console = Console()
    cells = [Cell(each, under_way, max(requests, under_way)) for each in images for under_way in concurrency]
    settings: dict[str, Any] = {"output_tokens": output_tokens, "flags": [*FLAGS, *flags.split()]}
    settings |= {"language_model": language_model, "environment": ENVIRONMENT}
    runs = stored(output / "serving.json", settings)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = make_geometry(folder / "model", language_model)
        bench = Bench(folder, folder / "model", output_tokens)
        with servers(folder, folder / "model", flags.split()) as (stock, pruned):
            for server in (stock, pruned):
                bench.run(server, Cell(1, 2, 4), None)  # set up once, for nothing

            contenders: dict[str, tuple[Server, dict[str, Any] | None]] = {
                "stock": (stock, None),
                "energy 1": (pruned, {"energy": 1.0}),
            } | {f"{each:.0%}": (pruned, exactly(round(each * TOKENS))) for each in share}
            for turn, cell in itertools.product(range(rounds), cells):
                for name in random.Random(turn).sample([*contenders], len(contenders)):
                    key = {"contender": name, "round": turn, **asdict(cell)}
                    if any(key.items() <= run.items() for run in runs):
                        continue
                    with console.status(f"round {turn + 1} of {rounds}: {cell}, {name}"):
                        runs.append(key | bench.run(contenders[name][0], cell, contenders[name][1]))
                    output.mkdir(exist_ok=True)
                    found = {"about": about() | settings, "summary": summarize(config, runs), "runs": runs}
                    (output / "serving.json").write_text(json.dumps(found, indent=1) + "\n")
    rows = summarize(config, runs)
    report(console, rows)
    draw(rows, output / "serving.png")


def stored(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs of an earlier call with the same settings on the same machine, if there was one."""
    found = json.loads(path.read_text()) if path.exists() else {"about": {}}
    here = {key: value for key, value in about().items() if key not in ("commit", "command")} | settings
    return found["runs"] if here.items() <= found["about"].items() else []


def summarize(config: LlavaConfig, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians of each contender under each load, as ratios to stock vLLM's in the same round; above 1 is faster. Rounds
    in which one is missing do not count."""
    contenders = [*dict.fromkeys(["stock", "energy 1", *(run["contender"] for run in runs)])]
    turns = Counter((run["images"], run["concurrency"], run["round"]) for run in runs)
    runs = [run for run in runs if turns[run["images"], run["concurrency"], run["round"]] == len(contenders)]
    columns = [column for column in COLUMNS if all(run[column] for run in runs)]  # nothing is between a single token
    cells = sorted({Cell(run["images"], run["concurrency"], run["requests"]) for run in runs}, key=astuple)
    rows = []
    for cell, contender in itertools.product(cells, contenders):

        def of(name: str, cell: Cell = cell) -> list[dict[str, Any]]:
            return [run for run in runs if run["contender"] == name and asdict(cell).items() <= run.items()]

        row: dict[str, Any] = {"contender": contender, "images": cell.images, "concurrency": cell.concurrency}
        for column in columns:
            ratios = [
                run[column] / stock[column] if column == "requests_per_second" else stock[column] / run[column]
                for run, stock in zip(of(contender), of("stock"), strict=True)
            ]
            row[column] = statistics.median(run[column] for run in of(contender))
            row[f"{column}_speedup"] = statistics.median(ratios)
            row[f"{column}_spread"] = [min(ratios), max(ratios)]
        for stage in STAGES:
            if times := [run[f"{stage}_ms"] for run in of(contender) if f"{stage}_ms" in run]:
                row[f"{stage}_ms"] = statistics.median(times)
        tokens, unpruned = (statistics.mean(run["prompt_tokens"] for run in of(name)) for name in (contender, "stock"))
        row["prompt_tokens"] = tokens
        row["limit"] = flops(config, cell.images, unpruned) / flops(config, cell.images, tokens)
        rows.append(row)
    return rows


def report(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table(title="Speed-up over stock vLLM, median (least to most) of the rounds; above 1 is faster")
    headings = ("images", "concurrency", "contender", "prompt", "limit", "first token", "between tokens", "requests/s")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "contender" else "right")
    for row in rows:
        ratios = [
            f"{row[f'{c}_speedup']:.2f} ({row[f'{c}_spread'][0]:.2f} to {row[f'{c}_spread'][1]:.2f})"
            if f"{c}_speedup" in row
            else ""
            for c in COLUMNS
        ]
        start = (str(row["images"]), str(row["concurrency"]), row["contender"])
        table.add_row(*start, f"{row['prompt_tokens']:.0f}", f"{row['limit']:.2f}", *ratios)
    console.print(table)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Speed-up of the first token, and of throughput, beside what the counted operations allow."""
    cells = sorted({(row["images"], row["concurrency"]) for row in rows})
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    figure, grid = plt.subplots(2, 1, figsize=(11, 8), sharex=True, layout="constrained")
    for axes, column, title in zip(
        grid, ("first_token", "requests_per_second"), ("first token", "requests per second"), strict=True
    ):
        for number, contender in enumerate(contenders):
            own = {(row["images"], row["concurrency"]): row for row in rows if row["contender"] == contender}
            at = [index + (number - len(contenders) / 2) * 0.1 for index in range(len(cells))]
            heights = [own[cell][f"{column}_speedup"] for cell in cells]
            spread = [
                [abs(own[cell][f"{column}_spread"][end] - height) for cell, height in zip(cells, heights, strict=True)]
                for end in (0, 1)
            ]
            axes.bar(at, heights, 0.1, yerr=spread, label=contender)
            axes.plot(at, [own[cell]["limit"] for cell in cells], "k_")
        axes.plot([], [], "k_", label="limit (counted operations)")
        axes.axhline(1, color="black", linewidth=0.5)
        axes.set_ylabel(f"{title}: speed-up over stock")
    names = [f"{images} image{'s' * (images > 1)},\n{under_way} at once" for images, under_way in cells]
    grid[1].set_xticks(range(len(cells)), names)
    grid[0].legend(ncols=3, fontsize=8)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    typer.run(main)
