"""Large images, stock vLLM and the plugin:  python benchmarks/large.py

A Qwen2.5-VL of real geometry with random weights; one request at a time, each with a new image: seconds to its only
token, and how many of them the engine spends on encoding, spectrum and selection. A third of the tokens is kept. Writes
``large.json`` after each size.
"""

import itertools
import math
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from common import RESULTS, Flags, Output, save, scene, show_medians
from geometry import QWEN, make_qwen
from servers import FLAGS, STAGES, Contender, ask, contenders, in_turns, stages, stock_and_plugin

PIXELS = 28  # of one token, each way


def measure(contender: Contender, image: Path) -> dict[str, float]:
    """Seconds until the answer of one token is there, and of each stage."""
    before = stages(contender.server)
    seconds = ask(contender.server, image.as_uri(), contender.options).seconds
    after = stages(contender.server)
    return {"seconds": seconds} | {stage: after[stage] - before[stage] for stage in STAGES}


def main(
    tokens: Annotated[list[int], typer.Option(help="Tokens of an image.")] = [1024, 4096, 16384],  # noqa: B006
    requests: Annotated[int, typer.Option(help="Requests of each size and contender, after one to warm up.")] = 3,
    language_model: Annotated[str, typer.Option(help=f"One of {', '.join(QWEN)}.")] = "7b",
    flags: Flags = "",
    output: Output = RESULTS,
) -> None:
    found: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder, seeds = Path(name), itertools.count()
        make_qwen(folder / "model", language_model)
        own = [*FLAGS, "--max-model-len", str(max(tokens) + 1024), *flags.split()]
        with stock_and_plugin(folder, folder / "model", own) as both:
            for count in tokens:
                side = PIXELS * math.isqrt(count)

                def ask_once(contender: Contender, side: int = side) -> dict[str, float]:
                    seed = next(seeds)
                    image = folder / f"{seed}.jpg"
                    scene(seed).resize((side, side)).save(image)
                    return measure(contender, image)

                found[count] = in_turns(contenders(*both, {"a third": count // 3}), requests, ask_once)
                save(output / "large.json", {"flags": own, "language_model": language_model}, found=found)
    for count, rounds in found.items():
        title = f"{count} tokens: seconds to the only token and for each stage, median of {requests}"
        show_medians(title, rounds, ["seconds", *STAGES])


if __name__ == "__main__":
    typer.run(main)
