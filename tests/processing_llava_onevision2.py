"""Code that comes with a checkpoint of LLaVA-OneVision 2: its configuration and processors, as vLLM expects them."""

from typing import Any

import torch
from transformers import BatchFeature, PretrainedConfig, Qwen3Config


class LlavaOnevision2VisionConfig(PretrainedConfig):  # type: ignore[misc]
    model_type = "llava_onevision2_vision"


class LlavaOnevision2Config(PretrainedConfig):  # type: ignore[misc]
    model_type = "llava_onevision2"
    sub_configs = {"vision_config": LlavaOnevision2VisionConfig, "text_config": Qwen3Config}

    def __init__(self, vision_config: Any = None, text_config: Any = None, **kwargs: Any) -> None:
        self.vision_config = LlavaOnevision2VisionConfig(**(vision_config or {}))
        self.text_config = Qwen3Config(**(text_config or {}))
        super().__init__(**kwargs)


class LlavaOnevision2VideoProcessor:
    """To vLLM, frames are images."""

    def __init__(self, **kwargs: Any) -> None:
        pass


class LlavaOnevision2Processor:
    """Says in which frame, row and column patches are. vLLM puts as many placeholders instead of each image as it
    takes."""

    def __init__(self, image_processor: Any, tokenizer: Any, video_processor: Any, codec_config: Any) -> None:
        self.image_processor, self.tokenizer = image_processor, tokenizer

    def __call__(self, text: Any, images: Any = None, **kwargs: Any) -> BatchFeature:
        made = {}
        if images:
            made = dict(self.image_processor(images, return_tensors="pt"))
            of_each = [self._positions(*grid) for grid in made["image_grid_thw"].tolist()]
            made["patch_positions"] = torch.cat(of_each)
        return BatchFeature({**self.tokenizer(text, return_tensors="pt"), **made})

    def _positions(self, frames: int, height: int, width: int) -> torch.Tensor:
        """``[patches, 3]``, those of a token one after the other."""
        side, all_of = self.image_processor.merge_size, (torch.arange(length) for length in (frames, height, width))
        positions = torch.cartesian_prod(*all_of).view(-1, height // side, side, width // side, side, 3)
        return positions.transpose(2, 3).reshape(-1, 3)
