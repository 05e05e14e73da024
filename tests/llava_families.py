"""Small checkpoints of LLaVA's architectures, with random weights."""

from collections.abc import Callable
from typing import Any

from parts import LLAVA, PATCH, SIDE, TEMPLATE, TILES, text_settings, tower_config
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)


def _llava(tower: Any) -> tuple[Any, Any, Any]:
    has_cls = tower is CLIPVisionConfig
    strategy = "default" if has_cls else "full"
    config = LlavaConfig(
        vision_config=tower_config(tower),
        text_config=LlamaConfig(**text_settings(LLAVA)),
        image_token_index=LLAVA.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy=strategy,
    )
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        LLAVA,
        patch_size=PATCH,
        vision_feature_select_strategy=strategy,
        chat_template=TEMPLATE.format(image="<image>\n", video=""),
        num_additional_image_tokens=int(has_cls),
    )
    return LlavaForConditionalGeneration, config, processor


def _llava_next(text: Any) -> tuple[Any, Any, Any]:
    config = LlavaNextConfig(
        vision_config=tower_config(CLIPVisionConfig),
        text_config=text(**text_settings(LLAVA)),
        image_token_index=LLAVA.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=TILES,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    size = {"height": SIDE, "width": SIDE}
    processor = LlavaNextProcessor(
        LlavaNextImageProcessor(size={"shortest_edge": SIDE}, crop_size=size, image_grid_pinpoints=TILES),
        LLAVA,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE.format(image="<image>\n", video=""),
        num_additional_image_tokens=1,
    )
    return LlavaNextForConditionalGeneration, config, processor


def _llava_onevision() -> tuple[Any, Any, Any]:
    tiles = [[SIDE * rows, SIDE * columns] for rows in range(1, 5) for columns in range(1, 5)]
    config = LlavaOnevisionConfig(
        vision_config=tower_config(SiglipVisionConfig),
        text_config=Qwen2Config(**text_settings(LLAVA)),
        image_token_index=LLAVA.convert_tokens_to_ids("<image>"),
        video_token_index=LLAVA.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=tiles,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
    )
    size = {"height": SIDE, "width": SIDE}
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=tiles),
        LLAVA,
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATE.format(image="<image>\n", video="<video>\n"),
        vision_aspect_ratio="anyres_max_9",
    )
    return LlavaOnevisionForConditionalGeneration, config, processor


LLAVAS: dict[str, Callable[[], tuple[Any, Any, Any]]] = {
    "llava": lambda: _llava(CLIPVisionConfig),
    "llava_siglip": lambda: _llava(SiglipVisionConfig),
    "llava_next": lambda: _llava_next(LlamaConfig),
    "llava_next_mistral": lambda: _llava_next(MistralConfig),
    "llava_onevision": _llava_onevision,
}
