"""Servers are slow to start, so tests share them: one per configuration and session."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import Server

HERE = Path(__file__).parent
Start = Callable[..., Server]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.server)


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
    """The main server: bf16, prefix cache, images cut over several prefill chunks, four images a prompt."""
    flags = ["--plugin", "eadaprune", "--eadaprune-energy", "0.95", "--enforce-eager", "--dtype", "bfloat16"]
    flags += ["--max-num-batched-tokens", "128", "--max-num-seqs", "16", "--limit-mm-per-prompt", '{"image": 4}']
    server = Server(logs / "pruning.log", model, *flags)
    yield server
    server.close()


@pytest.fixture(scope="session")
def stock(logs: Path, model: Path) -> Iterator[Server]:
    """vLLM with this package installed and not named."""
    server = Server(logs / "stock.log", model, "--enforce-eager", "--dtype", "bfloat16")
    yield server
    server.close()
