"""Helpers of the tests: encoding an image without a server, and images to encode."""

import gc
from pathlib import Path

import numpy as np
import skimage.data
import torch
from PIL import Image

from eadaprune_vllm.checkpoint import Checkpoint
from eadaprune_vllm.local import LocalEncoder
from eadaprune_vllm.options import PruneOptions
from eadaprune_vllm.prune import Kept


def checkpoint(model: Path, dtype: torch.dtype = torch.bfloat16, load_format: str = "auto") -> Checkpoint:
    return Checkpoint(str(model), revision=None, download_dir=None, load_format=load_format, dtype=dtype)


class Reference(LocalEncoder):
    """What the front end of a server should decide, computed without one."""

    def kept(self, image: Image.Image, **options: object) -> Kept:
        return self.prune(image, PruneOptions.model_validate(options))


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
