"""Images, results and tables of the benchmarks."""

import json
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
# Options that most of the scripts have.
Output = Annotated[Path, typer.Option(help="Folder for the results.")]
Flags = Annotated[str, typer.Option(help="More flags for both servers, separated by spaces.")]


def about() -> dict[str, Any]:
    """The commit, the command and the machine that results come from."""
    here = Path(__file__).resolve().parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=here).stdout.strip()
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} cores"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    script = Path(sys.argv[0]).resolve()
    script = script.relative_to(here.parent) if script.is_relative_to(here.parent) else script
    command = shlex.join(["python", str(script), *sys.argv[1:]])
    return {"commit": commit, "command": command, "cpu": cpu.split(": ")[1], "device": device, **versions}


def save(path: Path, facts: dict[str, Any], /, **found: Any) -> None:
    """Write results as JSON, after ``about()`` and other facts, such as settings."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"about": about() | facts, **found}, indent=1) + "\n")


def show(title: str, headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; numbers with four digits."""
    table = Table(title=title)
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    Console().print(table)


def with_range(value: float, low: float, high: float) -> str:
    """A value and what it lies between."""
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


def show_medians(title: str, rounds: Mapping[str, Sequence[Mapping[str, Any]]], keys: Sequence[str]) -> None:
    """Print a table with a column for each contender: medians over its rounds, a line for each key."""
    rows = [
        [key.replace("_", " "), *(statistics.median(row[key] for row in own) for own in rounds.values())]
        for key in keys
    ]
    show(title, ["", *rounds], rows)


def scene(seed: int) -> Image.Image:
    """An image of its own for each seed: coloured squares under noise, from nearly blank to dense."""
    random = np.random.default_rng(seed)
    blocks = int(2 ** random.uniform(0, 7))
    squares = Image.fromarray(random.integers(0, 256, (blocks, blocks, 3), dtype=np.uint8)).resize((336, 336))
    noise = random.normal(0, 30 * random.random(), (336, 336, 3))
    return Image.fromarray(np.clip(np.array(squares) + noise, 0, 255).astype(np.uint8))
