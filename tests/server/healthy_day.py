"""Draws deploy/grafana/board.png:  PYTHONPATH=tests:deploy python tests/server/healthy_day.py [MINUTES]

A server with the embedded model, a Prometheus, and the traffic of a day without trouble in a few minutes: more and
fewer people ask about pictures, some of them again about the same one, and now and then one makes a mistake.
"""

import math
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
from grafana import render
from harness import content
from openai import BadRequestError, OpenAI
from PIL import Image
from prometheus import DEPLOY, Prometheus
from shared import photo

from eadaprune_vllm.demo import MODEL
from eadaprune_vllm.demo.run import FLAGS
from eadaprune_vllm.demo.scenes import make_scene
from eadaprune_vllm.demo.server import Server

WARM_UP = 1.0  # minutes before what is drawn
BUSIEST = 5.0  # requests a second
SIZE = ("--block-size", "32", "--num-gpu-blocks-override", "512")  # a small cache, as the model is small too


def picture(number: int) -> Image.Image:
    """Of every kind: scenes, photographs cut anywhere, pages, and one in ten blank."""
    random = np.random.default_rng(number)
    match number % 10:
        case 0:
            return Image.new("RGB", (400, 300), tuple(random.integers(0, 256, 3).tolist()))
        case 1 | 2 | 3:
            whole = photo(("astronaut", "coffee", "page", "rocket")[random.integers(4)])
            left, top = random.integers(0, 100, 2).tolist()
            return whole.crop((left, top, whole.width - left // 2, whole.height - top // 2))
        case _:
            return make_scene(number, held_out=True).image


def main(minutes: float) -> None:
    random = np.random.default_rng(0)
    with (
        tempfile.TemporaryDirectory() as folder,
        Server(Path(folder) / "log", MODEL, *FLAGS, *SIZE, "--eadaprune-load-aware") as server,
        closing(Prometheus(Path(folder), server.url.removeprefix("http://"))) as prometheus,
        ThreadPoolExecutor(64) as pool,
    ):
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none")

        def ask(number: int, mistaken: bool) -> None:
            options = {"eadaprune": {"energy": 2 if mistaken else 0.99}} if mistaken or number % 7 == 5 else {}
            try:
                client.chat.completions.create(
                    model=server.NAME,
                    messages=[{"role": "user", "content": content(picture(number), "What is in the picture?")}],
                    max_tokens=1000,
                    extra_body=options | {"ignore_eos": number % 3 > 0},
                )
            except BadRequestError:
                assert mistaken

        asked: list[Future[None]] = []
        start = time.monotonic()
        while (passed := (time.monotonic() - start) / 60) < minutes + WARM_UP:
            share = 0.55 - 0.45 * math.cos(2 * math.pi * passed / minutes)
            number = len(asked) if random.random() < 0.7 else max(len(asked) - int(random.integers(1, 20)), 0)
            asked.append(pool.submit(ask, number, bool(random.random() < 0.005)))
            time.sleep(random.exponential(1 / (share * BUSIEST)))
        render.render(prometheus.url, DEPLOY / "grafana/board.png", minutes, interval="30s", step=2)
        for each in asked:
            each.result()


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 10)
