"""Helpers of the tests: encoding an image without a server, and images to encode."""

import functools
import gc
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor

from eadaprune_vllm.checkpoint import Checkpoint
from eadaprune_vllm.device import CPU
from eadaprune_vllm.encoder import VisionEncoder, compute_dtype
from eadaprune_vllm.models import encoder_class
from eadaprune_vllm.options import PruneOptions
from eadaprune_vllm.prune import Kept, prune


def checkpoint(
    model: Path, dtype: torch.dtype = torch.bfloat16, load_format: str = "auto", device: torch.device = CPU
) -> Checkpoint:
    return Checkpoint(str(model), None, None, load_format=load_format, dtype=dtype, device=device)


def encoder(
    model: Path, dtype: torch.dtype = torch.bfloat16, load_format: str = "auto", device: torch.device = CPU
) -> VisionEncoder:
    """What a front end runs of a model, on the CPU yet, if it is to run elsewhere."""
    config = AutoConfig.from_pretrained(model)
    build = functools.partial(encoder_class(config.architectures[0]), config)
    return checkpoint(model, dtype, load_format, device).load(build)


class Reference:
    """What the front end of a server with ``--dtype dtype`` should decide, computed without one.

    At float16 it is the pixels that are float16; the tower computes in float32.
    """

    def __init__(self, model: Path, dtype: torch.dtype) -> None:
        self.encoder = encoder(model, compute_dtype(dtype))
        self.dtype = dtype
        self._processor = AutoImageProcessor.from_pretrained(model)

    def kept(self, image: Image.Image, **options: object) -> Kept:
        inputs = self._processor(image, return_tensors="pt")
        inputs["pixel_values"] = inputs["pixel_values"].to(self.dtype)
        with self.encoder.threads():
            return prune(self.encoder.encode(inputs), PruneOptions.model_validate(options))


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


def towers(_: object) -> list[str]:
    """Classes of vision towers and their layers alive anywhere in this process; run it in a worker to look there."""
    names = {type(thing).__name__ for thing in gc.get_objects() if issubclass(type(thing), torch.nn.Module)}
    return sorted(name for name in names if "Vision" in name or "Encoder" in name)


def module_classes(model: torch.nn.Module) -> list[str]:
    """Classes of a model's modules; run it on the engine's model to look for a tower."""
    return sorted({type(module).__name__ for module in model.modules()})
