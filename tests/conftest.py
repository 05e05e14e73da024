"""Fixtures: the model, what a server should decide, images, and the servers that tests share."""

import functools
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import copytree
from threading import Thread
from unittest import mock

import pytest
import torch
from families import make_family
from harness import DTYPE, MAX_DECODED, OWN_PROCESS, Server
from PIL import Image
from safetensors.torch import load_file, save_file
from shared import Reference, noise, photo
from stub import Stub
from transformers import AutoConfig

from eadaprune_vllm.demo.model import make_model

SERVER_TESTS = Path(__file__).parent / "server"
Start = Callable[..., Server]


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two files at a time, whatever the machine, unless some are named. More servers need more than 24 GB."""
    return 2 * (config.args_source is pytest.Config.ArgsSource.TESTPATHS)


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # as in the servers beside it
    if config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.option.markexpr:  # nothing was asked for
        config.option.markexpr = "not server and not slow"


def pytest_collection_finish() -> None:
    gc.freeze()  # what is imported stays, and need not be looked at in each collection


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if SERVER_TESTS in item.path.parents:
            item.add_marker(pytest.mark.server)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip("PyTorch finds no GPU"))


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        yield


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """What a test leaves in the environment, or what it calls does, no later test's processes inherit."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small LLaVA-1.5 with random weights."""
    folder = tmp_path_factory.mktemp("models") / "llava"
    make_model(folder)
    return folder


@pytest.fixture(scope="session")
def scorer(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a cross-encoder: with a head of one label."""
    folder = tmp_path_factory.mktemp("scorer") / "model"
    copytree(model, folder)
    config = AutoConfig.from_pretrained(folder)
    config.num_labels = config.text_config.num_labels = 1
    config.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights["language_model.score.weight"] = torch.randn(1, config.text_config.hidden_size) / 4
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of the small model of that name, made on first use."""
    folder = tmp_path_factory.mktemp("families")
    return functools.cache(lambda name: make_family(name, folder / name))


@pytest.fixture(scope="session")
def reference(model: Path) -> Reference:
    return Reference(model, getattr(torch, DTYPE))


@pytest.fixture(scope="session")
def images() -> dict[str, Image.Image]:
    """Real photographs of several sizes and densities, and two extremes."""
    photos = {name: photo(name) for name in ("astronaut", "chelsea", "coffee", "rocket", "page", "moon")}
    return photos | {"flat": Image.new("RGB", (400, 300), (90, 120, 200)), "noise": noise(0)}


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="module")
def start(logs: Path, model: Path) -> Iterator[Start]:
    """Starts servers that live until the end of the module."""
    servers: list[Server] = []

    def start(name: str, *flags: str, model: Path = model, **env: str) -> Server:
        servers.append(Server(logs / f"{name}.log", model, *flags, **env))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def pruning(logs: Path, model: Path) -> Iterator[Server]:
    """The main server: prefix cache, images cut over several prefill chunks, a cache that overflows."""
    flags = ["--plugin", "eadaprune", "--eadaprune-energy", "0.95", "--enforce-eager", "--dtype", DTYPE]
    flags += ["--eadaprune-min-tokens", "16"]  # and no least share, so that budgets differ where there are few tokens
    flags += ["--max-num-batched-tokens", "128", "--max-num-seqs", "16", "--limit-mm-per-prompt", '{"image": 4}']
    flags += ["--mm-processor-cache-gb", "0.003"]  # two images: others are evicted and encoded again
    flags += ["--eadaprune-detail-low", '{"energy": 0.6, "min_tokens": 4}', "--enable-scale-out"]
    flags += ["--eadaprune-report-cached", *OWN_PROCESS]
    env = {"VLLM_MAX_MEDIA_REQUEST_DECODE_BYTES": str(MAX_DECODED), "VLLM_SERVER_DEV_MODE": "1"}  # which can pause it
    server = Server(logs / "pruning.log", model, *flags, **env)
    yield server
    server.close()


@pytest.fixture(scope="session")
def stock(logs: Path, model: Path) -> Iterator[Server]:
    """vLLM with this package installed and not named."""
    server = Server(logs / "stock.log", model, "--enforce-eager", "--dtype", DTYPE, "--enable-scale-out", *OWN_PROCESS)
    yield server
    server.close()


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    monkeypatch.setenv("OPENAI_API_KEY", "mine")
    with Stub() as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()
