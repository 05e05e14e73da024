"""Large images beside stock vLLM:  python benchmarks/large.py

Two real servers of a Qwen2.5-VL of real geometry with random weights, stock vLLM and the plugin. One request at a time
with an image of its own: the time to its only token, and what of it the engine spent on encoding, spectrum and
selection. Features of random weights have no spectrum worth a threshold, so a third of the tokens is kept by
``min_tokens = max_tokens``. Writes ``large.json`` after each size.
"""

import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from common import RESULTS, about, scene
from geometry import QWEN, make_qwen
from rich.console import Console
from rich.table import Table
from serving import STAGES, servers, stages

from eadaprune_vllm.demo.server import Server
from eadaprune_vllm.tools.evaluate import exactly

PIXELS = 28  # of one token, each way


def seconds(server: Server, image: Path, options: dict[str, Any] | None) -> float:
    """Until the answer of one token is there."""
    part = {"type": "image_url", "image_url": {"url": f"file://{image}"}}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}]
    body = {"model": server.NAME, "messages": messages, "max_tokens": 1} | ({"eadaprune": options} if options else {})
    start = time.perf_counter()
    httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=600).raise_for_status()
    return time.perf_counter() - start


def main(
    tokens: Annotated[list[int], typer.Option(help="Of the images.")] = [1024, 4096, 16384],  # noqa: B006
    requests: Annotated[int, typer.Option(help="Of each size and contender, after one that does not count.")] = 3,
    language_model: Annotated[str, typer.Option(help=f"One of {', '.join(QWEN)}.")] = "7b",
    flags: Annotated[str, typer.Option(help="More flags for both servers, separated by spaces.")] = "",
    output: Annotated[Path, typer.Option(help="Folder that takes the results.")] = RESULTS,
) -> None:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_qwen(folder / "model", language_model)
        given = ["--max-model-len", str(max(tokens) + 1024), *flags.split()]
        with servers(folder, folder / "model", given) as (stock, pruned):
            for count in tokens:
                contenders: dict[str, tuple[Server, dict[str, Any] | None]] = {
                    "stock": (stock, None),
                    "energy 1": (pruned, {"energy": 1.0}),
                    "a third": (pruned, exactly(count // 3)),
                }
                side = PIXELS * math.isqrt(count)
                for contender, (server, options) in contenders.items():
                    times = []
                    for number in range(requests + 1):
                        image = folder / f"{contender}-{count}-{number}.jpg"
                        scene(hash((count, number)) % 2**32).resize((side, side)).save(image)
                        before = stages(server)
                        times.append(seconds(server, image, options))
                        after = stages(server)
                        spent = {stage: after[stage] - before[stage] for stage in STAGES}
                    row: dict[str, Any] = {
                        "tokens": count,
                        "contender": contender,
                        "seconds": statistics.median(times[1:]),
                    }
                    rows.append(row | {"runs": times[1:], "last": spent})
                output.mkdir(exist_ok=True)
                (output / "large.json").write_text(json.dumps({"about": about(), "found": rows}, indent=1) + "\n")
    table = Table(title="Seconds to the only token, and of that to decide, one request at a time")
    for heading in ("tokens", "contender", "seconds", *STAGES):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = [f"{number:.3f}" for number in (row["seconds"], *row["last"].values())]
        table.add_row(str(row["tokens"]), row["contender"], *cells)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
