"""Pruning decisions outside a server: the tower of a checkpoint in this process, asked about pictures."""

from pathlib import Path

import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor

from eadaprune_vllm import draw
from eadaprune_vllm.checkpoint import Checkpoint
from eadaprune_vllm.encoder import TowerSpec, VisionEncoder, compute_dtype
from eadaprune_vllm.options import PruneOptions
from eadaprune_vllm.prune import Kept, prune


class LocalEncoder:
    """Decides what the front end of a server with ``--dtype dtype`` decides.

    At float16 it is the pixels that are float16; the tower computes in float32.

    Args:
        model: folder of a LLaVA checkpoint.
        dtype: the model's.
    """

    def __init__(self, model: Path, dtype: torch.dtype) -> None:
        self.spec = TowerSpec.of(AutoConfig.from_pretrained(model))
        checkpoint = Checkpoint(str(model), None, None, load_format="auto", dtype=compute_dtype(dtype))
        self.encoder = VisionEncoder(self.spec, checkpoint.load(self.spec))
        self.dtype = dtype
        self._processor = AutoImageProcessor.from_pretrained(model)

    def prune(self, image: Image.Image, options: PruneOptions) -> Kept:
        """Which of the image's tokens stay."""
        pixels = self._processor(image, return_tensors="pt")["pixel_values"].to(self.dtype)
        with self.encoder.threads():
            return prune(self.encoder.encode(pixels), options)

    def seen(self, image: Image.Image) -> Image.Image:
        """The image as the tower sees it: resized and cropped."""
        return draw.seen(self._processor, image)
