"""Thresholds that follow the load of a real server, and what is exempt from it."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import load
import pytest
import torch
from conftest import Start
from grafana import render
from harness import BLOCK_SIZE, PlainServer, Server, content, eventually
from PIL import Image
from prometheus import Prometheus
from shared import Reference, noise

from eadaprune_vllm.core.draw import data_url
from eadaprune_vllm.demo.model import make_model
from eadaprune_vllm.demo.server import total

STREAMS, BLOCKS, ANSWER_TOKENS = 4, 2400, 15_000  # answers last for minutes, far longer than a test
HIGH = STREAMS * 576 / (BLOCKS * BLOCK_SIZE)  # what the streams' images alone take of the KV cache
POLICY = {"energy_floor": 0.6, "kv_usage_low": HIGH / 4, "kv_usage_high": HIGH, "waiting_low": 50, "waiting_high": 100}
FLAGS = ["--plugin", "eadaprune", "--enforce-eager", "--dtype", "bfloat16", "--eadaprune-energy", "0.99"]
FLAGS += ["--eadaprune-min-tokens", "16"]
FLAGS += ["--eadaprune-load-aware", json.dumps(POLICY), "--limit-mm-per-prompt", '{"image": 4}']
FLAGS += ["--num-gpu-blocks-override", str(BLOCKS), "--max-model-len", "16384"]
FLAGS += ["--hf-overrides", '{"text_config": {"max_position_embeddings": 16384}}']
FLAGS += ["--stream-interval", "20"]  # chunks so large that sending them leaves time for others


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model whose engine does not outrun its front end, which would answer nobody else."""
    folder = tmp_path_factory.mktemp("models") / "slow"
    make_model(folder, text_layers=48)
    return folder


@pytest.fixture(scope="module")
def server(start: Start, slow_model: Path) -> Server:
    return start("load", *FLAGS, model=slow_model)


def level(server: Server) -> float:
    return server.metric("eadaprune_load_level")


@contextmanager
def loaded(server: Server, seed: int) -> Iterator[None]:
    """While open, long answers about unpruned images are generated; then all their clients are gone at once."""
    body = {"model": server.NAME, "max_tokens": ANSWER_TOKENS, "ignore_eos": True, "stream": True}
    body["eadaprune"] = {"energy": 1}
    with ExitStack() as streams, httpx.Client(timeout=120) as client:
        for number in range(STREAMS):
            messages = [{"role": "user", "content": content(noise(seed + number))}]
            request = client.stream("POST", f"{server.url}/v1/chat/completions", json=body | {"messages": messages})
            assert streams.enter_context(request).status_code == 200
        eventually(lambda: level(server) == 1)
        yield
        assert level(server) == 1
    eventually(lambda: level(server) == 0)


def thresholds(answer: Any) -> list[tuple[float, float]]:
    return [(image["energy_threshold"], image["energy_requested"]) for image in answer.eadaprune["images"]]


def test_under_load_images_are_pruned_to_the_floor(server: Server, slow_model: Path) -> None:
    image, reference = noise(1), Reference(slow_model, torch.bfloat16)
    kept = {energy: len(reference.kept(image, energy=energy)) for energy in (0.99, 0.6)}
    assert kept[0.99] > 2 * kept[0.6]
    text = server.text_tokens()
    assert level(server) == 0
    assert server.prompt_tokens(image) == text + kept[0.99]
    with loaded(server, seed=100):
        answer = server.ask(image)
        assert thresholds(answer) == [(0.6, 0.99)]
        assert answer.usage
        assert answer.usage.prompt_tokens == text + kept[0.6]
        assert thresholds(server.ask(image)) == [(0.6, 0.99)]  # out of the cache
        # What is asked for is kept, and shares the cache with what was lowered to it.
        assert thresholds(server.ask(image, options={"energy": 0.6})) == [(0.6, 0.6)]
        assert thresholds(server.ask(image, noise(2), options={"energy": 0.98})) == [(0.98, 0.98)] * 2
        preview = server.post(
            "/v1/eadaprune/preview", {"messages": [{"role": "user", "content": content(image)}]}
        ).json()
        assert preview["images"][0]["kept_tokens"] == kept[0.99]
    assert server.prompt_tokens(image) == text + kept[0.99]
    assert thresholds(server.ask(image)) == [(0.99, 0.99)]


def test_metrics_show_requested_and_effective_thresholds(server: Server) -> None:
    def values() -> list[float]:
        samples = server.samples()
        names = ("load_lowered_total", "energy_requested_sum", "energy_threshold_sum", "images_total")
        return [total(samples, f"eadaprune_{name}") for name in names]

    before = values()
    with loaded(server, seed=200):
        server.ask(noise(3), noise(4))
        server.ask(noise(3), options={"energy": 0.95})
    lowered, requested, effective_options, count = (now - was for now, was in zip(values(), before, strict=True))
    assert lowered == 2
    assert requested == pytest.approx(count - 3 + 2 * 0.99 + 0.95)
    assert effective_options == pytest.approx(count - 3 + 2 * 0.6 + 0.95)


def test_images_sent_by_uuid_keep_their_threshold(server: Server) -> None:
    def ask(uuid: str, image: Image.Image | None) -> Any:
        part = {"type": "image_url", "image_url": {"url": data_url(image)} if image else None, "uuid": uuid}
        messages: Any = [{"role": "user", "content": [part]}]
        return server.client.chat.completions.create(model=server.NAME, messages=messages, max_tokens=1)

    assert thresholds(ask("calm", noise(5))) == [(0.99, 0.99)]
    with loaded(server, seed=300):
        assert thresholds(ask("calm", None)) == [(0.99, 0.99)]
        assert thresholds(ask("busy", noise(6))) == [(0.6, 0.99)]
    assert thresholds(ask("busy", None)) == [(0.6, 0.99)]
    assert thresholds(ask("busy", noise(6))) == [(0.99, 0.99)]


def test_images_of_earlier_turns_keep_theirs_and_their_prefix(server: Server) -> None:
    first: Any = {"role": "user", "content": content(noise(7), "What is it?")}
    answer: Any = {"role": "assistant", "content": "Noise."}
    second: Any = {"role": "user", "content": content(noise(8), "And this?")}

    def ask(*messages: Any) -> Any:
        return server.client.chat.completions.create(model=server.NAME, messages=messages, max_tokens=1)

    assert thresholds(ask(first)) == [(0.99, 0.99)]
    with loaded(server, seed=400):
        hits = server.metric("vllm:prefix_cache_hits_total")
        assert thresholds(ask(first, answer, second)) == [(0.99, 0.99), (0.6, 0.99)]
        assert server.metric("vllm:prefix_cache_hits_total") > hits + 150


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_burst_that_overflows_the_kv_cache_finishes_sooner(tmp_path: Path) -> None:
    """The burst of ``benchmarks/load.py`` on two servers, one after the other; a Prometheus watches the second."""
    model = tmp_path / "model"
    make_model(model, text_layers=load.TEXT_LAYERS)
    with PlainServer(tmp_path / "stay", model, *load.FLAGS) as server:
        stay = load.burst(server, requests=40, gap=0.4, max_tokens=100, seed=1)
    with PlainServer(tmp_path / "follow", model, *load.FLAGS, *load.FOLLOW) as server:
        prometheus = Prometheus(tmp_path, server.url.removeprefix("http://"))
        try:
            follow = load.burst(server, requests=40, gap=0.4, max_tokens=100, seed=1)

            def seen(title: str) -> list[list[float]]:
                (panel,) = (panel for panel in render.panels() if panel["title"] == title)
                values = [prometheus.values(expr, 600) for expr, _ in render.expressions(panel, "10s")]
                return [[value for value in of_one if value == value] for of_one in values]  # 0 / 0 before traffic

            def all_is_seen() -> bool:
                (levels,), (lowered,) = seen("Load level"), seen("Thresholds lowered")
                requested, effective_options = seen("Energy thresholds, mean")
                rises = max(levels, default=0) == 1 and max(lowered, default=0) > 0
                return rises and min(effective_options, default=1) < min(requested, default=0) == 1

            assert prometheus.waits_for(all_is_seen)
            render.render(prometheus.url, tmp_path / "board.png", minutes=1)
        finally:
            prometheus.close()
    # There may be more preemptions: where the burst is too much all the same, more requests run at once.
    assert stay["preemptions"] > 0
    assert follow["seconds"] < stay["seconds"]
    assert min(answer["energy"] for answer in stay["answers"]) == 1


def test_several_front_ends_share_the_load(start: Start, slow_model: Path) -> None:
    server = start("load-two", *FLAGS, "--api-server-count", "2", model=slow_model)
    with loaded(server, seed=500), ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(server.ask, [noise(600 + number) for number in range(8)]))
        assert [threshold for answer in answers for threshold in thresholds(answer)] == [(0.6, 0.99)] * 8
    answers = [server.ask(noise(700 + number)) for number in range(8)]
    assert [threshold for answer in answers for threshold in thresholds(answer)] == [(0.99, 0.99)] * 8
