"""Small checkpoints of architectures whose images are grids of tokens, as Qwen's are, with random weights."""

from collections.abc import Callable
from functools import partial
from typing import Any

import transformers
from llava_onevision2 import VISION, LlavaOnevision2ForConditionalGeneration
from parts import FULL, LINEAR, PATCH, SIDE, TEMPLATE, qwen3_5_settings, text_settings, tower_config
from processing_llava_onevision2 import LlavaOnevision2Config
from transformers import (
    Glm4vImageProcessor,
    Glm4vProcessor,
    Glm4vVideoProcessor,
    Glm46VImageProcessor,
    Glm46VProcessor,
    Glm46VVideoProcessor,
    PaddleOCRVLConfig,
    PaddleOCRVLForConditionalGeneration,
    PaddleOCRVLImageProcessor,
    PaddleOCRVLProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from eadaprune_vllm.demo.model import byte_tokenizer

QWEN = byte_tokenizer("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
GLM = byte_tokenizer(
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
    "<|image|>",
    "<|video|>",
)
PADDLE = byte_tokenizer("<|IMAGE_START|>", "<|IMAGE_END|>", "<|IMAGE_PLACEHOLDER|>")
# What the configuration calls a token -> what the tokenizer does.
QWEN_TOKENS = {
    "image": "<|image_pad|>",
    "video": "<|video_pad|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
}
GLM_TOKENS = {
    "image": "<|image|>",
    "video": "<|video|>",
    "image_start": "<|begin_of_image|>",
    "image_end": "<|end_of_image|>",
    "video_start": "<|begin_of_video|>",
    "video_end": "<|end_of_video|>",
}
MROPE = {"rope_type": "default", "mrope_section": [4, 6, 6]}
QWEN2_ROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}}
TOWER = {"depth": 4, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": 128}
MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
}
GLM_MOE = {
    "head_dim": 32,
    "n_routed_experts": 4,
    "use_qk_norm": False,  # checkpoints say it; transformers does not know it, and vLLM has no default
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
}


def _made(
    model: Any,
    config: Any,
    processors: tuple[Any, Any, Any],
    tokenizer: PreTrainedTokenizerFast,
    tokens: dict[str, str],
    pad: str,
    frames: int,
) -> tuple[Any, Any, Any]:
    """The model, its configuration and its processor.

    Args:
        model: class.
        config: what makes the configuration of token ids.
        processors: classes: the whole of it, that of images, and that of videos.
        tokenizer: of the model.
        tokens: what the configuration calls them, and what the tokenizer does.
        pad: what stands for an image in a prompt, or a video, with the word left out.
        frames: that an image is counted as, where its size is limited.
    """
    processor, image, video = processors
    made = config(**{f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()})
    given = {"patch_size": made.vision_config.patch_size, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    pixels = {"shortest_edge": frames * 56 * 56, "longest_edge": frames * 336 * 336}
    return (
        model,
        made,
        processor(
            image(size=pixels, **given),
            tokenizer,
            video(size=pixels | {"longest_edge": 8 * 112 * 112}, **given),
            chat_template=TEMPLATE.format(image=pad.format("image"), video=pad.format("video")),
        ),
    )


def _classes(named: str) -> tuple[Any, Any]:
    """transformers' model and its configuration."""
    return getattr(transformers, f"{named}ForConditionalGeneration"), getattr(transformers, f"{named}Config")


def _qwen(
    classes: tuple[Any, Any], processors: tuple[Any, Any], vision: dict[str, Any], text: dict[str, Any]
) -> tuple[Any, Any, Any]:
    model, config = classes
    processor, video = processors
    settings = partial(config, vision_config=vision, text_config=text_settings(QWEN) | text)
    pad = "<|vision_start|><|{}_pad|><|vision_end|>"
    return _made(model, settings, (processor, Qwen2VLImageProcessor, video), QWEN, QWEN_TOKENS, pad, 1)


def _qwen2() -> tuple[Any, Any, Any]:
    vision = {"depth": 3, "embed_dim": 64, "num_heads": 4, "hidden_size": 128, "mlp_ratio": 2, "patch_size": PATCH}
    processors = Qwen2VLProcessor, Qwen2VLVideoProcessor
    return _qwen(_classes("Qwen2VL"), processors, vision, QWEN2_ROPE)


def _qwen2_5() -> tuple[Any, Any, Any]:
    windows = {"fullatt_block_indexes": [1, 3], "window_size": 56, "tokens_per_second": 2, "patch_size": PATCH}
    processors = Qwen2_5_VLProcessor, Qwen2VLVideoProcessor
    return _qwen(_classes("Qwen2_5_VL"), processors, TOWER | windows, QWEN2_ROPE)


def _qwen3(named: str, text: dict[str, Any], vision: dict[str, Any]) -> tuple[Any, Any, Any]:
    vision = TOWER | {"num_position_embeddings": 256, "patch_size": 16} | vision
    return _qwen(_classes(named), (Qwen3VLProcessor, Qwen3VLVideoProcessor), vision, text)


def _qwen3_vl(named: str, text: dict[str, Any]) -> tuple[Any, Any, Any]:
    rope = {"rope_type": "default", "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    return _qwen3(named, {"rope_parameters": rope, "head_dim": 32} | text, {"deepstack_visual_indexes": [0, 2]})


def _glm(
    named: str, processors: tuple[Any, Any, Any], text: dict[str, Any], vision: dict[str, Any]
) -> tuple[Any, Any, Any]:
    model, config = _classes(named)
    tower = TOWER | {"depth": 3, "image_size": SIDE, "patch_size": PATCH} | vision
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5}
    settings = partial(config, vision_config=tower, text_config=text_settings(GLM) | {"rope_parameters": rope} | text)
    pad = "<|begin_of_{0}|><|{0}|><|end_of_{0}|>"
    return _made(model, settings, processors, GLM, GLM_TOKENS, pad, 2)


def _glm4v(named: str, text: dict[str, Any]) -> tuple[Any, Any, Any]:
    processors = Glm4vProcessor, Glm4vImageProcessor, Glm4vVideoProcessor
    return _glm(named, processors, text, {"intermediate_size": 96})


def _glm_ocr() -> tuple[Any, Any, Any]:
    text: dict[str, Any] = {"rope_parameters": MROPE | {"partial_rotary_factor": 1.0}}
    text["intermediate_size"] = 3 * 128  # vLLM takes it for the merger's
    return _glm("GlmOcr", (Glm46VProcessor, Glm46VImageProcessor, Glm46VVideoProcessor), text, {})


def _paddleocr() -> tuple[Any, Any, Any]:
    start, end, pad = "<|IMAGE_START|>", "<|IMAGE_END|>", "<|IMAGE_PLACEHOLDER|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=PADDLE.backend_tokenizer,
        extra_special_tokens={"image_token": pad},
        **PADDLE.special_tokens_map,
    )
    config = PaddleOCRVLConfig(
        vision_config=tower_config(dict),
        text_config=text_settings(PADDLE) | {"rope_parameters": MROPE, "head_dim": 32, "tie_word_embeddings": False},
        image_token_id=tokenizer.convert_tokens_to_ids(pad),
        vision_start_token_id=tokenizer.convert_tokens_to_ids(start),
        vision_end_token_id=tokenizer.convert_tokens_to_ids(end),
        tie_word_embeddings=False,
    )
    processor = PaddleOCRVLProcessor(
        PaddleOCRVLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 336 * 336}, patch_size=PATCH),
        tokenizer,
        chat_template=TEMPLATE.format(image=start + pad + end, video=""),
    )
    return PaddleOCRVLForConditionalGeneration, config, processor


def _llava_onevision2() -> tuple[Any, Any, Any]:
    classes = LlavaOnevision2ForConditionalGeneration, LlavaOnevision2Config
    return _qwen(classes, (Qwen2VLProcessor, Qwen2VLVideoProcessor), VISION, {"head_dim": 32})


GRIDS: dict[str, Callable[[], tuple[Any, Any, Any]]] = {
    "glm4v": lambda: _glm4v("Glm4v", {}),
    "glm4v_moe": lambda: _glm4v("Glm4vMoe", GLM_MOE),
    "glm_ocr": _glm_ocr,
    "llava_onevision2": _llava_onevision2,
    "paddleocr_vl": _paddleocr,
    "qwen2_vl": _qwen2,
    "qwen2_5_vl": _qwen2_5,
    "qwen3_vl": lambda: _qwen3_vl("Qwen3VL", {}),
    "qwen3_vl_moe": lambda: _qwen3_vl("Qwen3VLMoe", MOE),
    "qwen3_5": lambda: _qwen3("Qwen3_5", qwen3_5_settings(LINEAR), {}),
    "qwen3_5_full": lambda: _qwen3("Qwen3_5", qwen3_5_settings(FULL), {}),
    "qwen3_5_moe": lambda: _qwen3(
        "Qwen3_5Moe", qwen3_5_settings(LINEAR) | MOE | {"shared_expert_intermediate_size": 64}, {}
    ),
}
