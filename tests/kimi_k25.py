"""Kimi K2.5 as Moonshot publishes it: vLLM makes pixels in its own way, from settings that only it reads."""

import json
from pathlib import Path
from typing import Any

from transformers import (
    AutoTokenizer,
    BatchFeature,
    Kimi_K25ImageProcessor,
    Kimi_K25Processor,
    Kimi_K25VideoProcessor,
)
from transformers.image_utils import make_flat_list_of_images

PIXELS = {
    "patch_size": 14,
    "merge_kernel_size": 2,
    "temporal_merge_kernel_size": 4,
    "in_patch_limit": 600,  # with which no picture has more tokens than the square one that vLLM measures with
    "in_patch_limit_each_frame": 64,
    "in_patch_limit_video": 256,
    "patch_limit_on_one_side": 64,
    "fixed_output_tokens": None,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}


def moonshot(folder: Path) -> None:
    """Make it of the checkpoint in this folder."""
    (folder / "processor_config.json").unlink()
    (folder / "preprocessor_config.json").write_text(json.dumps({"media_proc_cfg": PIXELS}))
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["KimiK25ForConditionalGeneration"], "use_unified_vision_chunk": True}
    (folder / "config.json").write_text(json.dumps(config))


def hub_name(name: str) -> str:
    """The name of a weight on the hub, where transformers saves it under another."""
    name = name.replace("language_model.model.blocks.", "language_model.model.layers.")
    return name.replace("encoder.patch_embed.", "patch_embed.").removeprefix("model.")


def processor(folder: Path) -> Any:
    """transformers' for it, with vLLM's pixels."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    empty = Kimi_K25ImageProcessor(), tokenizer, Kimi_K25VideoProcessor()
    made = Kimi_K25Processor(*empty, chat_template=tokenizer.chat_template)
    made.image_processor = _Images()
    return made


class _Images:
    """vLLM's pixels of images, as transformers' processor has them."""

    merge_size = 2

    def __init__(self) -> None:
        from vllm.transformers_utils.processors import kimi_k25_vision_fused  # which loads a compiler

        self._make = kimi_k25_vision_fused.KimiK25FusedVisionProcessor(PIXELS)

    def __call__(self, images: Any, **kwargs: Any) -> BatchFeature:
        made = self._make.preprocess([{"type": "image", "image": image} for image in make_flat_list_of_images(images)])
        return BatchFeature({"pixel_values": made["pixel_values"], "image_grid_thw": made["grid_thws"]})

    def fetch_images(self, images: Any) -> Any:
        return images
