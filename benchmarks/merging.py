"""Whether tokens that go should live on in those that stay:  python benchmarks/merging.py

Held-out scenes and questions, the embedded model behind a real server. Images keep as many tokens as a threshold gives
them, chosen by each selector; these stay as they are, or are merged with those that go, in the ways that ``merged.py``
knows. Writes ``merging.json``.
"""

import asyncio
import json
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from common import RESULTS, about
from quality import FLAGS, held_out, thresholds
from rich.console import Console

from eadaprune_vllm.demo import MODEL
from eadaprune_vllm.demo.server import Server
from eadaprune_vllm.tools.evaluate import Results, adaptive, interval, run

PLAIN, MERGED = "as they are", ("mean", "half")
EXTENSION = ["--worker-extension-cls", "merged.Merging"]


def served(folder: Path, how: str) -> Server:
    """A server that may read what is in ``folder``, and does with tokens what ``merged.py`` says, or leaves them
    as they are."""
    env, flags = dict(os.environ), [*FLAGS, "--allowed-local-media-path", str(folder)]
    if how != PLAIN:
        path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [env.get("PYTHONPATH")])])
        env |= {"PYTHONPATH": path, "EADAPRUNE_MERGE": how}
        flags += EXTENSION
    return Server(folder / "log", MODEL, *flags, env=env)


def ask(how: str, folder: Path, scenes: int, energies: list[float], selectors: list[str]) -> Results:
    results = held_out(folder / "questions", scenes)
    with served(folder, how) as server:
        asyncio.run(run(results, server.url, adaptive(energies, selectors)))
    return results


def main(
    scenes: Annotated[int, typer.Option(help="About nine questions are asked of each.")] = 220,
    target: Annotated[list[int], typer.Option(help="Mean budget; may be given several times.")] = [24, 12],  # noqa: B006
    selector: Annotated[list[str], typer.Option(help="May be given several times.")] = ["span", "attention"],  # noqa: B006
    output: Annotated[Path, typer.Option(help="Folder that takes the result.")] = RESULTS,
) -> None:
    console, rows = Console(), list[dict[str, Any]]()
    found = thresholds()
    energies = [found[count] for count in target]
    with tempfile.TemporaryDirectory() as name:
        by_way = {how: ask(how, Path(name) / how, scenes, energies, selector) for how in (PLAIN, *MERGED)}
    plain = by_way[PLAIN]
    images = np.array([question.image for question in plain.questions])
    for how, results in by_way.items():
        for row in results.summary():
            gain = results.correct[row["setting"]].astype(float) - plain.correct[row["setting"]]
            row |= {"rows": how, "minus_plain": {"mean": float(gain.mean()), "interval": interval(gain, images)}}
            rows.append(row)
            shown = "{setting}, {rows}: {accuracy:.3f} at {mean_tokens:.1f} tokens".format(**row)
            console.print(f"{shown} ({gain.mean():+.3f})", highlight=False)
    output.mkdir(exist_ok=True)
    text = json.dumps({"about": about() | {"questions": len(images)}, "settings": rows}, indent=1)
    (output / "merging.json").write_text(text + "\n")


if __name__ == "__main__":
    typer.run(main)
