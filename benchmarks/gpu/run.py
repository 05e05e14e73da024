"""The benchmarks that need a GPU, on one GPU:  python benchmarks/gpu/run.py [--rehearse] [OUTPUT [PART ...]]

LLaVA-1.5-7B's geometry with random weights. Runs the scripts in the folder above, one after the other, and joins their
results in ``gpu.json``. A part that fails or runs into its time limit is recorded with the results so far, and the next
one starts. Called again with the same folder, parts that were not finished continue.

- ``serving-1``, ``serving-32``: stock vLLM, the plugin at energy 1.0, and pruned, in one run; 1, 16 and 64 requests at
  a time with new images, 1 and 32 tokens per answer. Also what the engine spends on each image, by stages;
  ``accelerator.py`` estimates these times
- ``decoding``: how long answers that are being written wait for a token while images come
- ``budget``: eigenvalues and other ways to compute a budget on the GPU, in batches, beside the plugin's
- ``large``: images of 1024, 4096 and 16384 tokens, with the geometry of Qwen2.5-VL-7B
- ``capacity``: how many requests fit into the KV cache

``--rehearse`` runs the same on a CPU, with tiny models and few requests, to see that it runs.
"""

import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

HERE = Path(__file__).parent.parent
# Both servers are up at the same time, so each gets less than half of the GPU.
SHARED_GPU = ["--flags", "--dtype bfloat16 --gpu-memory-utilization 0.42 --max-num-seqs 64"]
CPU = ["--flags", "--enforce-eager", "--language-model", "tiny"]
SERVING = ["serving.py", "--images", "1"]
LOADS = ["--language-model", "7b", "--rounds", "2", "--requests", "16", *SHARED_GPU]
LOADS += ["--concurrency", "1", "--concurrency", "16", "--concurrency", "64"]
TINY_LOADS = [*CPU, "--rounds", "1", "--requests", "2", "--concurrency", "1", "--concurrency", "2"]
SMALL = ["--batch", "1", "--most-tokens", "1024"]
BATCHES = [part for batch in (1, 4, 16, 32) for part in ("--batch", str(batch))]


@dataclass(frozen=True)
class Part:
    """One benchmark.

    Attributes:
        command: script and arguments that are always the same.
        gpu: more arguments on a GPU.
        rehearsal: more arguments in a rehearsal.
        file: name, or pattern of it, of what it writes.
        seconds: time limit.
    """

    command: list[str]
    gpu: list[str]
    rehearsal: list[str]
    file: str
    seconds: int


PARTS = {
    "serving-32": Part([*SERVING, "--output-tokens", "32"], LOADS, TINY_LOADS, "serving.json", 420),
    "serving-1": Part([*SERVING, "--output-tokens", "1"], LOADS, TINY_LOADS, "serving.json", 300),
    "decoding": Part(
        ["decoding.py"],
        ["--language-model", "7b", "--images", "60", "--rate", "12", "--writing", "4", *SHARED_GPU],
        [*CPU, "--images", "2", "--rate", "1", "--rounds", "1"],
        "decoding.json",
        240,
    ),
    "budget": Part(["budget.py", "--seconds", "1"], ["--device", "cuda", *BATCHES], SMALL, "budget*.json", 240),
    "large": Part(["large.py"], SHARED_GPU, [*CPU, "--tokens", "256", "--requests", "1"], "large.json", 240),
    "capacity": Part(["capacity.py"], [], [], "capacity.json", 120),
}


def run(part: Part, folder: Path, rehearse: bool) -> dict[str, object]:
    """Run a part; returns its exit status, its results so far, and if it failed the end of its log."""
    folder.mkdir(parents=True, exist_ok=True)
    script, *arguments = [*part.command, *(part.rehearsal if rehearse else part.gpu)]
    with (folder / "log").open("w") as log:
        command = [sys.executable, str(HERE / script), *arguments, "--output", str(folder)]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            process.wait(part.seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # lets it stop its servers
            process.wait()
    found: dict[str, object] = {"status": process.returncode}
    if process.returncode:
        found["log"] = (folder / "log").read_text()[-3000:]
    for written in folder.glob(part.file):
        found["found"] = json.loads(written.read_text())
    return found


def main(
    output: Annotated[Path, typer.Argument(help="Folder for the results.")] = HERE / "results" / "gpu",
    names: Annotated[list[str] | None, typer.Argument(metavar="[PART]...", help="Default: those not finished.")] = None,
    rehearse: Annotated[bool, typer.Option("--rehearse", help="On a CPU, with tiny models.")] = False,
) -> None:
    joined = output / "gpu.json"
    found: dict[str, dict[str, object]] = json.loads(joined.read_text()) if joined.exists() else {}
    for name in names or [name for name in PARTS if found.get(name, {}).get("status") != 0]:
        start = time.monotonic()
        found[name] = run(PARTS[name], output / name, rehearse)
        print(f"{name}: {time.monotonic() - start:.0f} s, exit status {found[name]['status']}", flush=True)
        joined.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
