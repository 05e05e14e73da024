"""InternVL as OpenGVLab publishes it (``InternVLChatModel``), made of transformers' checkpoint: weights have other
names, the folder brings code of its own for the configuration, and vLLM makes pixels in its own way."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from parts import original, renamed, set_aside
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, BatchFeature
from vllm.transformers_utils.processors import internvl

CODE = """
from transformers import PretrainedConfig, Qwen2Config


class InternVisionConfig(PretrainedConfig):
    model_type = "intern_vit_6b"


class InternVLChatConfig(PretrainedConfig):
    model_type = "internvl_chat"

    def __init__(self, vision_config=None, llm_config=None, **kwargs):
        super().__init__(**kwargs)
        self.vision_config = InternVisionConfig(**(vision_config or {}))
        self.llm_config = Qwen2Config(**(llm_config or {}))
"""
TILES = {"min_dynamic_patch": 1, "max_dynamic_patch": 4, "dynamic_image_size": True, "use_thumbnail": True}
NAMES = {
    "vision_tower.": "vision_model.",
    "cls_token": "class_embedding",
    "position_embeddings": "position_embedding",
    "patch_embeddings.projection": "patch_embedding",
    "encoder.layer.": "encoder.layers.",
    "attention.projection_layer": "attn.proj",
    "lambda_1": "ls1",
    "lambda_2": "ls2",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "multi_modal_projector.layer_norm": "mlp1.0",
    "multi_modal_projector.linear_1": "mlp1.1",
    "multi_modal_projector.linear_2": "mlp1.3",
}


def opengvlab(folder: Path) -> None:
    """Make it of the checkpoint in this folder."""
    within = set_aside(folder)
    for file in within.glob("tokenizer*"):
        shutil.copy(file, folder)
    template = (within / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template.replace("<IMG_CONTEXT>", "<image>"))
    weights = load_file(within / "model.safetensors")
    save_file({_name(name): weight for name, weight in _fused(weights).items()}, folder / "model.safetensors")
    config = json.loads((within / "config.json").read_text())
    vision = config["vision_config"]
    of_vision = {
        "image_size": vision["image_size"][0],
        "patch_size": vision["patch_size"][0],
        "qkv_bias": vision["attention_bias"],
        "qk_normalization": vision["use_qk_norm"],
        "initializer_factor": 1.0,
    }
    chat = {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
        "model_type": "internvl_chat",
        "vision_config": vision | of_vision | {"model_type": "intern_vit_6b"},
        "llm_config": config["text_config"] | {"architectures": ["Qwen2ForCausalLM"]},
        "downsample_ratio": config["downsample_ratio"],
        "select_layer": -1,
        "ps_version": "v2",
        "force_image_size": of_vision["image_size"],
        "dtype": config["dtype"],
    }
    (folder / "config.json").write_text(json.dumps(chat | TILES))
    (folder / "configuration_internvl_chat.py").write_text(CODE)


def _fused(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With queries, keys and values of the tower in one."""
    found: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        match = re.fullmatch(r"(vision_tower\..*\.)attention\.([qkv])_proj\.(weight|bias)", name)
        if not match:
            found[name] = weight
        elif match[2] == "q":
            parts = [weights[f"{match[1]}attention.{part}_proj.{match[3]}"] for part in "qkv"]
            found[f"{match[1]}attn.qkv.{match[3]}"] = torch.cat(parts)
    return found


def _name(name: str) -> str:
    return name if name.startswith("language_model.") else renamed(name, NAMES)


def _vllms(kind: str) -> Any:
    """vLLM's class of that kind, which has another name in 0.33."""
    return next(value for name, value in vars(internvl).items() if name in (f"InternVL{kind}", f"InternVLChat{kind}"))


def processor(folder: Path) -> Any:
    """transformers', with vLLM's pixels."""
    made = AutoProcessor.from_pretrained(original(folder))
    side = made.image_processor.size["height"]
    made.image_processor, made.video_processor = Images(side), Videos(side)
    return made


class Images:
    """vLLM's pixels of images, as transformers' processor has them."""

    def __init__(self, side: int) -> None:
        self._make = _vllms("ImageProcessor")(image_size=side, **TILES)

    def __call__(self, images: Any, **kwargs: Any) -> BatchFeature:
        made = self._make(images)
        return BatchFeature({"pixel_values": made["pixel_values_flat"], "num_patches": made["image_num_patches"]})

    def fetch_images(self, images: Any) -> Any:
        return images


class Videos:
    """The same of a video."""

    def __init__(self, side: int) -> None:
        self._make = _vllms("VideoProcessor")(image_size=side)

    def __call__(self, videos: Any, **kwargs: Any) -> BatchFeature:
        return BatchFeature({"pixel_values_videos": self._make(videos)["pixel_values_flat_video"][None]})
