"""The front end's vision tower against stock vLLM's own:  python benchmarks/encoder.py

Both in one process, on the same pixels, in turns: CLIP-L/14-336 with random weights, as stock vLLM builds it for its
engine, and as the plugin does for its front end (which also asks what the tower attends to). Writes ``encoder.json``.
"""

import json
import os
import statistics
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}

import torch
import typer
from common import RESULTS, about, scene
from geometry import make_geometry
from rich.console import Console
from rich.table import Table
from transformers import AutoImageProcessor
from vllm import LLM

from eadaprune_vllm.checkpoint import Checkpoint
from eadaprune_vllm.encoder import LlavaVisionEncoder, compute_dtype


def main(
    repeats: Annotated[int, typer.Option(help="Images per contender.")] = 15,
    device: Annotated[str, typer.Option(help="Where both compute: cpu or cuda.")] = "cpu",
    output: Annotated[Path, typer.Option(help="Folder that takes the results.")] = RESULTS,
) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name, "model")
        config = make_geometry(folder)
        config.text_config.num_hidden_layers = 1  # not what is measured
        config.save_pretrained(folder)
        llm = LLM(str(folder), load_format="dummy", enforce_eager=True, max_model_len=2048, dtype="bfloat16")
        place = torch.device(device)
        source = Checkpoint(str(folder), None, None, "dummy", compute_dtype(torch.bfloat16, place), device=place)
        encoder = source.load(partial(LlavaVisionEncoder, config)).to(place)
        processor = AutoImageProcessor.from_pretrained(folder)
    threads = torch.get_num_threads()
    pixels = [processor(scene(seed), return_tensors="pt").pixel_values.bfloat16() for seed in range(repeats)]

    def stock(model: Any, image: torch.Tensor) -> Any:
        with torch.inference_mode():
            return model._image_pixels_to_features(model.vision_tower, image.to(place)).cpu()

    def ours(_: Any, image: torch.Tensor) -> Any:
        return encoder({"pixel_values": image}).tokens.features

    def race(model: Any) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {"stock vLLM": [], "eadaprune": []}
        for image in [pixels[0], *pixels]:
            for name, encode in zip(times, (stock, ours), strict=True):
                start = time.perf_counter()
                encode(model, image)
                times[name].append(time.perf_counter() - start)
        return {name: spent[1:] for name, spent in times.items()}

    (times,) = llm.apply_model(race)
    ratios = [ours / theirs for theirs, ours in zip(*times.values(), strict=True)]
    table = Table(title=f"Encoding one image, median (least to most) of {repeats}; {threads} threads, {encoder.dtype}")
    for heading in ("tower", "milliseconds"):
        table.add_column(heading)
    for name, spent in times.items():
        milliseconds = [1000 * each for each in (statistics.median(spent), min(spent), max(spent))]
        table.add_row(name, "{:.0f} ({:.0f} to {:.0f})".format(*milliseconds))
    table.add_row("ratio", f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    Console().print(table)
    output.mkdir(exist_ok=True)
    found = {"seconds": times, "ratio": statistics.median(ratios), "threads": threads, "dtype": str(encoder.dtype)}
    (output / "encoder.json").write_text(json.dumps({"about": about(), "found": found}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
