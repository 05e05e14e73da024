"""Code that comes with a checkpoint of Kimi-VL: pixels, as vLLM expects them of Moonshot's."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import make_flat_list_of_images


class KimiVLImageProcessor(BaseImageProcessor):  # type: ignore[misc]
    """Shrinks images to ``in_token_limit`` patches, and fills them up with black to whole tokens."""

    def __init__(self, patch_size: int = 14, in_token_limit: int = 600, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.patch_size, self.in_token_limit, self.merge_kernel_size = patch_size, in_token_limit, (2, 2)

    def preprocess(self, images: Any, **kwargs: Any) -> BatchFeature:
        made = [self._patches(image) for image in make_flat_list_of_images(images)]
        return BatchFeature(
            {
                "pixel_values": torch.cat([patches.flatten(0, 1) for patches in made]),
                "image_grid_hws": torch.tensor([patches.shape[:2] for patches in made]),
            }
        )

    def _patches(self, image: Image.Image) -> torch.Tensor:
        """``[height, width, 3, patch_size, patch_size]``"""
        patch, token = self.patch_size, 2 * self.patch_size
        width, height = image.size
        patches = (width // patch) * (height // patch)
        if patches > self.in_token_limit:
            scale = (self.in_token_limit / patches) ** 0.5
            image = image.resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
        width, height = (-(-side // token) * token for side in image.size)
        filled = Image.new("RGB", (width, height))
        filled.paste(image)
        pixels = torch.from_numpy(np.array(filled)).permute(2, 0, 1) / 127.5 - 1
        return pixels.unfold(1, patch, patch).unfold(2, patch, patch).permute(1, 2, 0, 3, 4)


class KimiVLProcessor(ProcessorMixin):  # type: ignore[misc]
    """vLLM puts as many placeholders instead of each as it takes."""

    image_token = "<|media_pad|>"

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        made = self.image_processor(images) if images else {}
        return BatchFeature({**self.tokenizer(text, return_tensors="pt"), **made})
