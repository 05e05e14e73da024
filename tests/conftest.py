"""Fixtures shared by all tests: the embedded model, what a server should decide, and images."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from shared import Reference, noise, photo

from eadaprune_vllm.demo.model import demo_model


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session")
def model() -> Path:
    """Folder of the embedded model."""
    return demo_model()


@pytest.fixture(scope="session")
def reference(model: Path) -> Reference:
    return Reference(model, torch.bfloat16)


@pytest.fixture(scope="session")
def images() -> dict[str, Image.Image]:
    """Real photographs of several sizes and densities, and two extremes."""
    photos = {name: photo(name) for name in ("astronaut", "chelsea", "coffee", "rocket", "page", "moon")}
    return photos | {"flat": Image.new("RGB", (400, 300), (90, 120, 200)), "noise": noise(0)}
