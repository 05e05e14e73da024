"""Helpers of the tests: images to encode, and what should be decided about them."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from harness import environment
from PIL import Image
from reference import Reference

__all__ = ["ROOT", "Reference", "noise", "photo", "program", "run"]
ROOT = Path(__file__).parent.parent


def program(name: str) -> str:
    """Path of a program of the system's packages. Without it the test is skipped, but not on CI."""
    path = shutil.which(name)
    if path is None:
        say = pytest.fail if os.environ.get("CI") else pytest.skip
        say(f"{name} is not installed")
    return path


def run(*command: object, cwd: Path = ROOT) -> str:
    """What a command prints; fails the test if the command does."""
    line = [str(part) for part in command]
    done = subprocess.run(line, cwd=cwd, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def photo(name: str) -> Image.Image:
    return Image.fromarray(getattr(skimage.data, name)()).convert("RGB")


def noise(seed: int, size: int = 336, blocks: int = 336) -> Image.Image:
    """Random colours in ``blocks`` x ``blocks`` squares: the more blocks, the denser the scene."""
    pixels = np.random.default_rng(seed).integers(0, 256, (blocks, blocks, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST)
