"""Decisions that are made beside the engine's steps, as on a GPU: what happens between the launch of a batch and its
responses. On a CPU alone they come with the call that launches, so a plugin (``overlapping.py``) overlaps them."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import overlapping
import psutil
import pytest
from harness import DTYPE, OWN_PROCESS, Server, content
from openai.types.chat import ChatCompletion
from overlapping import DECISION_SECONDS
from PIL import Image
from shared import Reference, noise

# Four batches of three images in flight.
FLAGS = ["--eadaprune-energy", "0.9", "--eadaprune-min-tokens", "1", "--max-num-batched-tokens", "8192"]
FLAGS += ["--enforce-eager", "--dtype", DTYPE]
TP2 = ["--tensor-parallel-size", "2", *OWN_PROCESS]
IN_FLIGHT = DECISION_SECONDS / 2  # seconds after which a request's batch is launched and not decided
Images = dict[str, Image.Image]


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return overlapping.environment(tmp_path_factory.mktemp("overlapping")) | {"VLLM_SERVER_DEV_MODE": "1"}


@pytest.fixture(scope="module")
def server(start: Callable[..., Server], env: dict[str, str]) -> Server:
    return start("overlap", *FLAGS, **env)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


def kept(answer: ChatCompletion) -> int:
    assert answer.model_extra
    return int(answer.model_extra["eadaprune"]["kept_tokens"])


def write(server: Server) -> list[float]:
    """Seconds that an answer to a text waits for each token."""
    waits: list[float] = []
    with server.client.completions.create(
        model="demo", prompt="Once", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
    ) as chunks:
        next(iter(chunks))
        last = time.monotonic()
        for _ in chunks:
            waits.append(time.monotonic() - last)
            last = time.monotonic()
    return waits


def test_answers_are_written_while_an_image_is_decided_about(
    server: Server, images: Images, reference: Reference, pool: ThreadPoolExecutor
) -> None:
    asked, waits = pool.submit(server.ask, images["coffee"]), list[float]()
    while not asked.done():
        waits += write(server)
    assert sum(waits) > DECISION_SECONDS / 2
    assert max(waits) < DECISION_SECONDS / 2
    assert kept(asked.result()) == len(reference.kept(images["coffee"], energy=0.9, min_tokens=1))


def test_many_images_at_a_time(server: Server, images: Images, reference: Reference, pool: ThreadPoolExecutor) -> None:
    """More than are in flight; each gets what is its own."""
    cases = [(name, energy) for name in images for energy in (0.8, 0.95)]
    asked = [pool.submit(server.ask, images[name], options={"energy": energy}) for name, energy in cases]
    counts = [kept(each.result()) for each in asked]
    assert counts == [len(reference.kept(images[name], energy=energy, min_tokens=1)) for name, energy in cases]


@pytest.mark.parametrize(
    ("seed", "path"), [(8100, "/reset_prefix_cache"), (8101, "/reset_mm_cache"), (8102, "/reset_encoder_cache")]
)
def test_caches_are_reset_in_between(
    server: Server, reference: Reference, pool: ThreadPoolExecutor, seed: int, path: str
) -> None:
    image = noise(seed, blocks=20)
    asked = pool.submit(server.ask, image)
    time.sleep(IN_FLIGHT)
    assert httpx.post(f"{server.url}{path}", timeout=60).status_code == 200
    assert kept(asked.result()) == len(reference.kept(image, energy=0.9, min_tokens=1))
    assert kept(server.ask(image)) == kept(asked.result())


def test_the_engine_is_paused_in_between(server: Server, reference: Reference, pool: ThreadPoolExecutor) -> None:
    image = noise(8200, blocks=20)
    asked = pool.submit(server.ask, image)
    time.sleep(IN_FLIGHT)
    assert httpx.post(f"{server.url}/pause", timeout=60).status_code == 200
    time.sleep(2 * DECISION_SECONDS)
    assert not asked.done()
    assert httpx.post(f"{server.url}/resume", timeout=60).status_code == 200
    assert kept(asked.result()) == len(reference.kept(image, energy=0.9, min_tokens=1))


def test_weights_are_updated_in_between(server: Server, pool: ThreadPoolExecutor) -> None:
    """The decision of old weights does not become one of the new ones."""
    image = noise(8300, blocks=20)

    def encoded() -> float:
        return server.metric("eadaprune_stage_seconds_count", stage="encode")

    asked, before = pool.submit(server.ask, image), encoded()
    time.sleep(IN_FLIGHT)
    assert server.post("/collective_rpc", {"method": "reload_weights"}).status_code == 200
    same = kept(asked.result())
    assert kept(server.ask(image)) == same
    assert encoded() == before + 2


def test_clients_give_up_in_between(server: Server, reference: Reference, pool: ThreadPoolExecutor) -> None:
    """Their images are asked for again at once, by others."""
    several = [noise(8400 + number, blocks=10 + number) for number in range(8)]

    def give_up_and_ask(image: Image.Image) -> int:
        body = {"model": "demo", "messages": [{"role": "user", "content": content(image)}], "max_tokens": 1}
        with pytest.raises(httpx.TimeoutException):
            httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=IN_FLIGHT)
        return kept(server.ask(image))

    found = list(pool.map(give_up_and_ask, several))
    assert found == [len(reference.kept(image, energy=0.9, min_tokens=1)) for image in several]
    server.wait_until_idle()


@pytest.mark.slow
def test_ranks_under_load(
    start: Callable[..., Server], env: dict[str, str], images: Images, pool: ThreadPoolExecutor, model: Path
) -> None:
    """Two ranks, whose collective calls would hang if they came in another order; a third of the clients gives up."""
    cores = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "60"}
    flags = [*FLAGS[:-1], "float32"]
    server, alone = start("overlap-tp2", *flags, *TP2, **env, **cores), start("alone", *flags, "--plugin", "eadaprune")
    several = [*images.values(), *(noise(8500 + number, blocks=8 + 4 * number) for number in range(8))]

    def ask(number: int) -> tuple[int, str | None] | None:
        image, options = several[number % len(several)], {"energy": (0.8, 0.9, 0.97)[number % 3]}
        if number % 3 == 2:
            body = {"model": "demo", "messages": [{"role": "user", "content": content(image)}], "eadaprune": options}
            try:
                httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=0.2 + number % 5 / 2)
            except httpx.TimeoutException:
                return None
        answer = server.ask(image, options=options, max_tokens=8)
        return kept(answer), answer.choices[0].message.content

    found = list(pool.map(ask, range(60)))
    for number, answer in enumerate(found):
        if answer:
            expected = alone.ask(
                several[number % len(several)], options={"energy": (0.8, 0.9, 0.97)[number % 3]}, max_tokens=8
            )
            assert answer == (kept(expected), expected.choices[0].message.content)
    assert sum(answer is None for answer in found) >= 5
    server.wait_until_idle()


def test_the_engine_dies_in_between(server: Server, pool: ThreadPoolExecutor) -> None:
    """The last test of this server."""
    asked: Future[Any] = pool.submit(server.ask, noise(8600))
    time.sleep(IN_FLIGHT)
    children = psutil.Process(server.process.pid).children(recursive=True)
    (engine,) = [each for each in children if "EngineCore" in each.name()]
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(openai.APIError):
        asked.result(30)
    server.process.wait(60)
