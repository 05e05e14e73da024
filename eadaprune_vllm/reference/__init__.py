"""The reference pictures: a small, fixed mixture of kinds of images, shipped with the package."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eadaprune_vllm.core.options import CHUNK

_FRAMES = 4  # of a still picture as a video


def pictures() -> Iterator[tuple[str, Image.Image]]:
    """The kind of each picture (``photograph``, ``page``, ``chart``, ``screen`` or ``surface``) and the picture in RGB,
    sorted by file name."""
    files = (file for file in Path(__file__).parent.iterdir() if file.suffix in (".jpg", ".png"))
    for file in sorted(files, key=lambda file: file.name):
        with Image.open(file) as picture:
            yield file.name.partition("-")[0], picture.convert("RGB")


def as_mm_data(picture: Image.Image, limits: Mapping[str, int]) -> dict[str, list[Any]]:
    """A picture as vLLM's multimodal data, by modality: as an image, or for models without images as a video of equal
    frames.

    Args:
        picture: RGB.
        limits: how many items of each modality the model takes.
    """
    if limits.get(CHUNK):
        return {CHUNK: [{"type": "image", "image": picture, "uuid": None}]}
    if limits.get("image"):
        return {"image": [picture]}
    frames = np.stack([np.asarray(picture)] * _FRAMES)
    metadata = {"fps": 1.0, "frames_indices": [*range(_FRAMES)], "total_num_frames": _FRAMES, "do_sample_frames": False}
    return {"video": [(frames, metadata)]}
