"""A burst that overflows the KV cache, with and without load-aware thresholds:  python benchmarks/load.py

The same requests, at the same times, go to a server whose thresholds stay and to one whose thresholds follow its load,
in turns. Each has a new image, and thresholds start at 1.0: nothing is pruned before there is load. Weights are random:
this is about queues and the KV cache, not about answers. The language model is narrow and deep, so that it keeps the
engine busy, and not the vision tower. Writes ``load.json`` and ``load.png``.
"""

import json
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
import typer
from common import RESULTS, Output, save, show_medians
from matplotlib import pyplot as plt
from PIL import Image
from rich.console import Console
from servers import ask

from eadaprune_vllm.core.draw import data_url
from eadaprune_vllm.demo.model import make_model
from eadaprune_vllm.demo.server import Server, total

POLICY = {"energy_floor": 0.9, "kv_usage_low": 0.4, "kv_usage_high": 0.7, "waiting_low": 1, "waiting_high": 8}
TEXT_LAYERS = 192
FLAGS = ["--plugin", "eadaprune", "--eadaprune-energy", "1.0", "--enforce-eager", "--dtype", "bfloat16"]
FLAGS += ["--eadaprune-min-tokens", "16"]
FLAGS += ["--block-size", "32", "--num-gpu-blocks-override", "192", "--max-model-len", "2048", "--max-num-seqs", "64"]
FOLLOW = ["--eadaprune-load-aware", json.dumps(POLICY)]
COUNTED = ["vllm:num_preemptions_total", "vllm:request_queue_time_seconds_sum", "vllm:prompt_tokens_total"]
SHOWN = ["seconds", "median_first_token", "mean_queue_seconds", "preemptions", "prompt_tokens", "last_level"]


def picture(seed: int) -> Image.Image:
    """Coloured squares and noise: of middling density, where those of ``common.scene`` differ."""
    random = np.random.default_rng(seed)
    squares = Image.fromarray(random.integers(0, 256, (12, 12, 3), dtype=np.uint8)).resize((336, 336))
    return Image.fromarray(np.clip(np.array(squares) + random.normal(0, 12, (336, 336, 3)), 0, 255).astype(np.uint8))


def burst(server: Server, requests: int, gap: float, max_tokens: int, seed: int) -> dict[str, Any]:
    """Send requests ``gap`` seconds apart, and wait for all answers.

    Returns:
        What ``SHOWN`` names (times in seconds), and all answers in the order of their requests.
    """
    urls = [data_url(picture(seed + number)) for number in range(requests)]
    before = server.samples()
    start = time.perf_counter()
    with ThreadPoolExecutor(requests) as pool:
        pending = []
        for number, url in enumerate(urls):
            time.sleep(max(0.0, start + number * gap - time.perf_counter()))
            pending.append(pool.submit(ask, server, url, max_tokens=max_tokens))
        answers = [asdict(each.result()) for each in pending]
    seconds = time.perf_counter() - start
    after = server.samples()
    preemptions, queued, prompt = (total(after, name) - total(before, name) for name in COUNTED)
    return {
        "seconds": seconds,
        "preemptions": preemptions,
        "mean_queue_seconds": queued / requests,
        "prompt_tokens": prompt,
        "median_first_token": statistics.median(answer["first_token"] for answer in answers),
        "last_level": total(after, "eadaprune_load_level"),
        "answers": answers,
    }


def main(
    requests: Annotated[int, typer.Option(help="Requests of a burst.")] = 60,
    gap: Annotated[float, typer.Option(help="Seconds between two of them.")] = 0.4,
    max_tokens: Annotated[int, typer.Option(help="Tokens of every answer.")] = 100,
    rounds: Annotated[int, typer.Option(help="Bursts per server.")] = 3,
    output: Output = RESULTS,
) -> None:
    names = {"thresholds stay": [], "thresholds follow the load": FOLLOW}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        make_model(model, text_layers=TEXT_LAYERS)
        for turn in range(rounds):
            for name, flags in names.items():
                status = Console().status(f"{name}, burst {turn + 1} of {rounds}")
                with status, Server(Path(folder, "log"), model, *FLAGS, *flags) as server:
                    ask(server, data_url(picture(0)), max_tokens=4)
                    found[name].append(burst(server, requests, gap, max_tokens, seed=1000 * turn + 1))
    show_medians(f"Median of {rounds} bursts", found, SHOWN)
    settings = {"policy": POLICY, "requests": requests, "gap": gap, "max_tokens": max_tokens, "flags": FLAGS}
    save(output / "load.json", settings, bursts=found)
    draw(found, gap, output / "load.png")


def draw(found: dict[str, list[dict[str, Any]]], gap: float, path: Path) -> None:
    """Draw when first tokens came, and thresholds in force, over the time of each request."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    for number, (name, bursts) in enumerate(found.items()):
        for each in bursts:
            at = [gap * index for index in range(len(each["answers"]))]
            above.plot(at, [answer["first_token"] for answer in each["answers"]], color=f"C{number}", alpha=0.6)
            below.plot(at, [answer["energy"] for answer in each["answers"]], ".", color=f"C{number}", alpha=0.6)
        above.plot([], [], color=f"C{number}", label=name)
    above.set_ylabel("seconds to first token")
    above.legend()
    below.set_ylabel("energy threshold in force")
    below.set_xlabel("seconds into the burst at which the request was sent")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    typer.run(main)
