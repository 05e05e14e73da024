"""Kimi's models as Moonshot publishes them, made of transformers' checkpoint of Kimi K2.5.

Kimi K2.5: vLLM makes pixels in its own way, from settings that only it reads. Kimi-VL, which transformers does not
know, has the tower of Kimi K2.5 without time, and code of its own for pixels.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import processing_kimi_vl
from parts import ORIGINAL, original, renamed
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad
from transformers import (
    AutoTokenizer,
    BatchFeature,
    Kimi_K25ImageProcessor,
    Kimi_K25Processor,
    Kimi_K25VideoProcessor,
)
from transformers.image_utils import make_flat_list_of_images

LIMIT = 600  # patches, with which no picture has more tokens than the square one that vLLM measures with
PIXELS = {
    "patch_size": 14,
    "merge_kernel_size": 2,
    "temporal_merge_kernel_size": 4,
    "in_patch_limit": LIMIT,
    "in_patch_limit_each_frame": 64,
    "in_patch_limit_video": 256,
    "patch_limit_on_one_side": 64,
    "fixed_output_tokens": None,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}
# Of weights, in Kimi-VL.
NAMES = {
    "mm_projector.proj.0.": "multi_modal_projector.linear_1.",
    "mm_projector.proj.2.": "multi_modal_projector.linear_2.",
    "mm_projector.": "multi_modal_projector.",
}


def kimi_k25(folder: Path) -> None:
    """Make it of the checkpoint in this folder."""
    (folder / "processor_config.json").unlink()
    (folder / "preprocessor_config.json").write_text(json.dumps({"media_proc_cfg": PIXELS}))
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["KimiK25ForConditionalGeneration"], "use_unified_vision_chunk": True}
    (folder / "config.json").write_text(json.dumps(config))


def kimi_vl(folder: Path) -> None:
    """Make it of the checkpoint in this folder, which stays within it."""
    within = folder / ORIGINAL
    shutil.copytree(folder, within)
    (folder / "processor_config.json").unlink()
    code = Path(processing_kimi_vl.__file__)
    shutil.copy(code, folder)
    classes = {"AutoImageProcessor": "KimiVLImageProcessor", "AutoProcessor": "KimiVLProcessor"}
    by_name = {"auto_map": {name: f"{code.stem}.{own}" for name, own in classes.items()}}
    settings = {"image_processor_type": "KimiVLImageProcessor", "processor_class": "KimiVLProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | by_name | {"in_token_limit": LIMIT}))
    config = json.loads((within / "config.json").read_text())
    vision, text = config["vision_config"], config["text_config"]
    for side in ("height", "width"):
        vision[f"init_pos_emb_{side}"] = vision.pop(f"pos_emb_{side}")
    del vision["model_type"], text["model_type"]
    config = {
        "model_type": "kimi_vl",
        "architectures": ["KimiVLForConditionalGeneration"],
        "dtype": config["dtype"],
        "media_placeholder_token_id": config["image_token_id"],
        "vision_config": vision,
        "text_config": text,
    }
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(within / "model.safetensors")
    save_file({renamed(name, NAMES): weight for name, weight in weights.items()}, folder / "model.safetensors")


def hub_name(name: str) -> str:
    """The name of a weight of Kimi K2.5 on the hub, where transformers saves it under another."""
    name = name.replace("language_model.model.blocks.", "language_model.model.layers.")
    return name.replace("encoder.patch_embed.", "patch_embed.").removeprefix("model.")


def processor(folder: Path) -> Any:
    """transformers', with pixels as vLLM sees them."""
    tokenizer = AutoTokenizer.from_pretrained(original(folder))
    empty = Kimi_K25ImageProcessor(), tokenizer, Kimi_K25VideoProcessor()
    made = Kimi_K25Processor(*empty, chat_template=tokenizer.chat_template)
    made.image_processor = _Images(folder.name)
    return made


class _Images:
    """Pixels of images, as transformers' processor has them."""

    merge_size = 2

    def __init__(self, name: str) -> None:
        self._patches = _patches_of_kimi_vl if name == "kimi_vl" else _patches_of_kimi_k25

    def __call__(self, images: Any, **kwargs: Any) -> BatchFeature:
        patches, grid = self._patches(make_flat_list_of_images(images))
        return BatchFeature({"pixel_values": patches, "image_grid_thw": grid})

    def fetch_images(self, images: Any) -> Any:
        return images


def _patches_of_kimi_vl(images: list[Any]) -> tuple[Any, Any]:
    made = processing_kimi_vl.KimiVLImageProcessor(in_token_limit=LIMIT)(images)
    return made["pixel_values"], pad(made["image_grid_hws"], (1, 0), value=1)


def _patches_of_kimi_k25(images: list[Any]) -> tuple[Any, Any]:
    from vllm.transformers_utils.processors import kimi_k25_vision_fused  # which loads a compiler

    make = kimi_k25_vision_fused.KimiK25FusedVisionProcessor(PIXELS)
    made = make.preprocess([{"type": "image", "image": image} for image in images])
    return made["pixel_values"], made["grid_thws"]
