"""Engines of several workers, on CPUs: tensor, pipeline and data parallel. Every one of them keeps what one worker
keeps, and answers alike."""

import os
from pathlib import Path
from typing import Any

import openai
import pytest
from conftest import Start
from harness import OWN_PROCESS, Server, content
from PIL import Image
from shared import noise

pytestmark = pytest.mark.slow
TWO_WORKERS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
RANKS = {
    "tp2": ["--tensor-parallel-size", "2"],
    "tp2-data": ["--tensor-parallel-size", "2", "--mm-encoder-tp-mode", "data"],
    "pp2": ["--pipeline-parallel-size", "2"],
    "dp2": ["--data-parallel-size", "2"],
    "dp2-api2": ["--data-parallel-size", "2", "--api-server-count", "2"],
}
# In float32, so that rounding decides on no token.
FLAGS = ["--plugin", "eadaprune", "--eadaprune-min-tokens", "1", "--enforce-eager", "--dtype", "float32"]
OPTIONS: list[dict[str, Any]] = [
    {"energy": 1.0},
    {"energy": 0.98},
    {"energy": 0.9},
    {"energy": 0.98, "selector": "attention"},
    {"energy": 0.98, "selector": "hybrid"},
]
Images = dict[str, Image.Image]


def parts(images: Images) -> list[list[Image.Image | str]]:
    return [[images["coffee"]], [images["page"], "and", noise(3)], [images["flat"]]]


def kept(server: Server, images: Images) -> list[list[int]]:
    """How many tokens of images stay, by the options."""
    found = []
    for options in OPTIONS:
        for each in parts(images):
            body = {"messages": [{"role": "user", "content": content(*each)}], "eadaprune": options}
            response = server.post("/v1/eadaprune/preview", body)
            assert response.status_code == 200, response.text
            found.append([image["kept_tokens"] for image in response.json()["images"]])
    return found


def answers(server: Server, images: Images, options: list[dict[str, Any]]) -> list[tuple[int, str | None]]:
    """Tokens of prompts and answers."""
    found = []
    for each in parts(images):
        for own in options:
            response = server.ask(*each, options=own, max_tokens=8)
            assert response.usage
            found.append((response.usage.prompt_tokens, response.choices[0].message.content))
    return found


@pytest.fixture(scope="module")
def alone(start: Start) -> Server:
    return start("alone", *FLAGS)


class Failing:
    """A worker extension: encoding fails on the second rank, before it meets the first in a collective."""

    def fail_to_encode(self) -> None:
        def embed(**_: Any) -> Any:
            raise RuntimeError("one rank of two")

        if self.rank == 1:  # type: ignore[attr-defined]
            model = self.model_runner.get_model()  # type: ignore[attr-defined]
            model.embed_multimodal = model.eadaprune_encode = embed


@pytest.mark.parametrize("plugin", [True, False])
def test_a_rank_that_fails_alone_ends_the_engine(start: Start, images: Images, plugin: bool) -> None:
    """As on stock vLLM: within its limit for a step the engine is dead, and the server with it."""
    flags = [*(FLAGS if plugin else FLAGS[4:]), *RANKS["tp2"], *OWN_PROCESS]
    flags += ["--worker-extension-cls", "test_ranks.Failing"]
    path = os.pathsep.join(str(folder) for folder in (Path(__file__).parent, Path(__file__).parent.parent))
    env = TWO_WORKERS | {"PYTHONPATH": path, "VLLM_SERVER_DEV_MODE": "1", "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "8"}
    server = start(f"failing-{plugin}", *flags, **env)
    assert server.ask(images["coffee"]).usage
    assert server.post("/collective_rpc", {"method": "fail_to_encode"}).status_code == 200
    with pytest.raises(openai.APIError):
        server.ask(images["moon"])
    server.process.wait(60)


@pytest.mark.parametrize("ranks", RANKS)
def test_tensor_parallel_decisions_equal_those_of_one_worker(
    start: Start, alone: Server, images: Images, ranks: str
) -> None:
    server = start(
        ranks,
        *FLAGS,
        *RANKS[ranks],
        *OWN_PROCESS,
        **({"VLLM_CPU_OMP_THREADS_BIND": "auto"} if ranks.startswith("dp") else TWO_WORKERS),
    )
    try:
        assert kept(server, images) == kept(alone, images)
        # Stock vLLM fails to generate with pipeline stages on CPUs. Where ranks share images out, none of
        # them sees all attention, and span takes the place of selectors that go by it.
        options = {"pp2": [], "tp2-data": OPTIONS[:3]}.get(ranks, OPTIONS)
        for _ in range(2):  # whichever engine and API server it is the second time
            assert answers(server, images, options) == answers(alone, images, options)
    finally:
        server.close()
