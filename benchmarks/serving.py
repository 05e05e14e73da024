"""Stock vLLM and the plugin under load, end to end:  python benchmarks/serving.py

Two servers on one machine, of a LLaVA-1.5 with its real tower, a language model of 1B parameters and random weights.
``vllm bench serve`` sends new images to every contender, in turns: to stock vLLM; to the plugin at ``energy`` 1.0,
where all tokens are kept, which shows what the plugin costs; and to the plugin with fixed shares of the tokens.

The limit in the results is counted, not measured: how many times fewer operations a prompt takes. Each turn also notes
what the engine spent on a new image, by stages. Writes ``serving.json`` after each turn, and ``serving.png`` in the
end. Turns that ``serving.json`` has already, with the same settings, are not repeated: a run can be stopped and go on.
"""

import contextlib
import itertools
import json
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
from common import RESULTS, Flags, Output, about, save, scene, show, with_range
from geometry import IMAGE_TOKENS, LANGUAGE_MODELS, flops, make_geometry
from matplotlib import pyplot as plt
from rich.console import Console
from servers import ENVIRONMENT, FLAGS, STAGES, Contender, contenders, stages, stock_and_plugin
from transformers import LlavaConfig
from vllm.benchmarks.serve import add_cli_args
from vllm.benchmarks.serve import main as bench_serve
from vllm.utils.argparse_utils import FlexibleArgumentParser

PROMPT = "What is in the picture, and where?"
COLUMNS = {
    "first_token": "median_ttft_ms",
    "between_tokens": "median_tpot_ms",
    "requests_per_second": "request_throughput",
    "p99_first_token": "p99_ttft_ms",
}


@dataclass(frozen=True)
class Cell:
    """One load.

    Attributes:
        images: per request.
        concurrency: requests at a time, at most.
        requests: in all.
        side: of an image, in pixels.
        rate: requests per second; by default each is sent as soon as it may be.
    """

    images: int
    concurrency: int
    requests: int
    side: int = 336
    rate: float | None = None

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.rate:g} requests per second" if self.rate else f"{self.concurrency} at a time"


def bench(
    contender: Contender,
    cell: Cell,
    folder: Path,
    seeds: Iterator[int],
    output_tokens: int,
) -> dict[str, float]:
    """Send the requests of one turn by ``vllm bench serve``, with the images of the next seeds.

    Returns:
        By name of ``COLUMNS`` milliseconds and requests per second; milliseconds of each stage per new image, if the
        server pruned; and ``prompt_tokens``, the mean of a request.
    """
    server, data = contender.server, folder / "requests.jsonl"
    with data.open("w") as lines:
        for number in range(cell.requests):
            paths = [folder / f"{number}-{index}.png" for index in range(cell.images)]
            for path in paths:
                scene(next(seeds)).resize((cell.side, cell.side)).save(path)
            lines.write(json.dumps({"prompt": PROMPT, "image_files": [str(path) for path in paths]}) + "\n")
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    arguments = ["--backend", "openai-chat", "--endpoint", "/v1/chat/completions", "--base-url", server.url]
    arguments += ["--model", server.NAME, "--tokenizer", str(folder / "model"), "--ignore-eos", "--disable-tqdm"]
    arguments += ["--dataset-name", "custom_image", "--dataset-path", str(data), "--disable-shuffle"]
    arguments += ["--custom-output-len", str(output_tokens), "--num-prompts", str(cell.requests)]
    arguments += ["--max-concurrency", str(cell.concurrency), "--num-warmups", "0", "--ready-check-timeout-sec", "0"]
    if cell.rate:
        arguments += ["--request-rate", str(cell.rate)]
    if contender.options:
        arguments += ["--extra-body", json.dumps({"eadaprune": contender.options})]
    before, spent_before = server.metric("vllm:prompt_tokens_total"), stages(server)
    with (folder / "bench.log").open("a") as log, contextlib.redirect_stdout(log):
        result = bench_serve(parser.parse_args(arguments))
    assert result["completed"] == cell.requests, result
    found = {name: float(result[key]) for name, key in COLUMNS.items()}
    spent = {name: value - spent_before[name] for name, value in stages(server).items()}
    if pruned := spent.pop("pruned"):
        found |= {f"{stage}_ms": 1000 * seconds / pruned for stage, seconds in spent.items()}
    return found | {"prompt_tokens": (server.metric("vllm:prompt_tokens_total") - before) / cell.requests}


def stored(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The turns of an earlier call with the same settings on the same machine, if there was one."""
    found = json.loads(path.read_text()) if path.exists() else {"about": {}}
    here = {key: value for key, value in about().items() if key not in ("commit", "command")} | settings
    return found["runs"] if here.items() <= found["about"].items() else []


def summarize(config: LlavaConfig, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians of each contender under each load, and their ratios to stock vLLM's in the same round, above 1 if faster.
    Rounds that are not complete do not count."""
    names = [*dict.fromkeys(["stock", "energy 1", *(run["contender"] for run in runs)])]
    turns = Counter((run["images"], run["concurrency"], run["round"]) for run in runs)
    runs = [run for run in runs if turns[run["images"], run["concurrency"], run["round"]] == len(names)]
    columns = [column for column in COLUMNS if all(run[column] for run in runs)]  # nothing is between a single token
    cells = sorted({Cell(run["images"], run["concurrency"], run["requests"]) for run in runs}, key=astuple)
    rows = []
    for cell in cells:
        own = {
            name: [run for run in runs if run["contender"] == name and asdict(cell).items() <= run.items()]
            for name in names
        }
        unpruned = statistics.mean(run["prompt_tokens"] for run in own["stock"])
        for name in names:
            row: dict[str, Any] = {"contender": name, "images": cell.images, "concurrency": cell.concurrency}
            for column in columns:
                pairs = [(run[column], stock[column]) for run, stock in zip(own[name], own["stock"], strict=True)]
                more_is_better = column == "requests_per_second"
                ratios = [ours / stock if more_is_better else stock / ours for ours, stock in pairs]
                row[column] = statistics.median(run[column] for run in own[name])
                row[f"{column}_speedup"] = statistics.median(ratios)
                row[f"{column}_spread"] = [min(ratios), max(ratios)]
            for stage in STAGES:
                if times := [run[f"{stage}_ms"] for run in own[name] if f"{stage}_ms" in run]:
                    row[f"{stage}_ms"] = statistics.median(times)
            row["prompt_tokens"] = statistics.mean(run["prompt_tokens"] for run in own[name])
            row["limit"] = flops(config, cell.images, unpruned) / flops(config, cell.images, row["prompt_tokens"])
            rows.append(row)
    return rows


def report(rows: list[dict[str, Any]]) -> None:
    """Print speed-ups."""

    def ratio(row: dict[str, Any], column: str) -> str:
        return with_range(row[f"{column}_speedup"], *row[f"{column}_spread"]) if f"{column}_spread" in row else ""

    headings = ["images", "at a time", "contender", "prompt", "limit", *(each.replace("_", " ") for each in COLUMNS)]
    lines = [
        [row["images"], row["concurrency"], row["contender"], f"{row['prompt_tokens']:.0f}", f"{row['limit']:.2f}"]
        + [ratio(row, column) for column in COLUMNS]
        for row in rows
    ]
    show("Speed-up over stock vLLM, median (range) of the rounds; above 1 is faster", headings, lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw speed-ups of the first token and of throughput, beside what the counted operations allow."""
    figure, grid = plt.subplots(2, 1, figsize=(11, 8), sharex=True, layout="constrained")
    names = list(dict.fromkeys(row["contender"] for row in rows))
    for axes, column in zip(grid, ("first_token", "requests_per_second"), strict=True):
        for number, name in enumerate(names):
            own = [row for row in rows if row["contender"] == name]
            at = [index + (number - len(names) / 2) * 0.1 for index in range(len(own))]
            heights = [row[f"{column}_speedup"] for row in own]
            spread = [[abs(row[f"{column}_spread"][end] - row[f"{column}_speedup"]) for row in own] for end in (0, 1)]
            axes.bar(at, heights, 0.1, yerr=spread, label=name)
            axes.plot(at, [row["limit"] for row in own], "k_")
        axes.plot([], [], "k_", label="limit (counted operations)")
        axes.axhline(1, color="black", linewidth=0.5)
        axes.set_ylabel(f"{column.replace('_', ' ')}: speed-up over stock")
    cells = dict.fromkeys((row["images"], row["concurrency"]) for row in rows)
    labels = [f"{images} image{'s' * (images > 1)},\n{at_once} at a time" for images, at_once in cells]
    grid[1].set_xticks(range(len(labels)), labels)
    grid[0].legend(ncols=3, fontsize=8)
    figure.savefig(path, dpi=100)


def main(
    images: Annotated[list[int], typer.Option(help="Images per request.")] = [1, 4],  # noqa: B006
    concurrency: Annotated[list[int], typer.Option(help="Requests at a time.")] = [1, 4, 16],  # noqa: B006
    requests: Annotated[int, typer.Option(help="Requests of a turn, and at least as many as at a time.")] = 4,
    share: Annotated[list[float], typer.Option(help="Share of the tokens that is kept.")] = [0.5, 0.22, 0.11],  # noqa: B006
    rounds: Annotated[int, typer.Option(help="How often each contender has its turn.")] = 3,
    output_tokens: Annotated[int, typer.Option(help="Tokens of every answer.")] = 16,
    language_model: Annotated[str, typer.Option(help=f"One of {', '.join(LANGUAGE_MODELS)}.")] = "1b",
    flags: Flags = "",
    output: Output = RESULTS,
) -> None:
    console, seeds, own = Console(), itertools.count(), [*FLAGS, *flags.split()]
    cells = [Cell(each, at_once, max(requests, at_once)) for each in images for at_once in concurrency]
    settings: dict[str, Any] = {"output_tokens": output_tokens, "flags": own}
    settings |= {"language_model": language_model, "environment": ENVIRONMENT}
    runs = stored(output / "serving.json", settings)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = make_geometry(folder / "model", language_model)
        with stock_and_plugin(folder, folder / "model", own) as both:
            for server in both:
                bench(Contender("to warm up", server), Cell(1, 2, 4), folder, seeds, output_tokens)
            every = contenders(*both, {f"{each:.0%}": round(each * IMAGE_TOKENS) for each in share})
            for turn, cell in itertools.product(range(rounds), cells):
                for each in random.Random(turn).sample(every, len(every)):
                    key = {"contender": each.name, "round": turn, **asdict(cell)}
                    if any(key.items() <= run.items() for run in runs):
                        continue
                    with console.status(f"round {turn + 1} of {rounds}: {cell}, {each.name}"):
                        runs.append(key | bench(each, cell, folder, seeds, output_tokens))
                    save(output / "serving.json", settings, summary=summarize(config, runs), runs=runs)
    rows = summarize(config, runs)
    report(rows)
    draw(rows, output / "serving.png")


if __name__ == "__main__":
    typer.run(main)
