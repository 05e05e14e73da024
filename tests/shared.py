"""Helpers of the tests: images to encode, and what should be decided about them."""

import os
import shutil

import numpy as np
import pytest
import skimage.data
from PIL import Image
from reference import Reference

__all__ = ["Reference", "noise", "photo", "program"]


def program(name: str) -> str:
    """Path of a program of the system's packages. Without it the test is skipped, but not on CI."""
    path = shutil.which(name)
    if path is None:
        say = pytest.fail if os.environ.get("CI") else pytest.skip
        say(f"{name} is not installed")
    return path


def photo(name: str) -> Image.Image:
    return Image.fromarray(getattr(skimage.data, name)()).convert("RGB")


def noise(seed: int, size: int = 336, blocks: int = 336) -> Image.Image:
    """Random colours in ``blocks`` x ``blocks`` squares: the more blocks, the denser the scene."""
    pixels = np.random.default_rng(seed).integers(0, 256, (blocks, blocks, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST)
