"""Small checkpoints of every supported architecture, with random weights: they show that the plumbing works."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from generic_families import GENERIC, UNLISTED
from huggingface_hub import save_torch_state_dict
from internvl_chat import opengvlab
from kimi import hub_name, kimi_k25, kimi_vl
from llava_onevision2 import VISION, LlavaOnevision2ForConditionalGeneration, lmms_lab
from mistral_format import mistral
from parts import FULL, LINEAR, LLAVA, PATCH, SIDE, TEMPLATE, TILES, qwen3_5_settings, text_settings, tower_config
from processing_llava_onevision2 import LlavaOnevision2Config
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vImageProcessor,
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    Glm4vProcessor,
    Glm4vVideoProcessor,
    Glm46VImageProcessor,
    Glm46VProcessor,
    Glm46VVideoProcessor,
    GlmOcrConfig,
    GlmOcrForConditionalGeneration,
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
    PaddleOCRVLConfig,
    PaddleOCRVLForConditionalGeneration,
    PaddleOCRVLImageProcessor,
    PaddleOCRVLProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipVisionConfig,
)

from eadaprune_vllm.demo.model import byte_tokenizer, random_model

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


def _qwen(
    model: Any, config: Any, processor: Any, video: Any, vision: dict[str, Any], text: dict[str, Any], patch: int
) -> tuple[Any, Any, Any]:
    ids = {
        name: QWEN.convert_tokens_to_ids(token)
        for name, token in (
            ("image_token_id", "<|image_pad|>"),
            ("video_token_id", "<|video_pad|>"),
            ("vision_start_token_id", "<|vision_start|>"),
            ("vision_end_token_id", "<|vision_end|>"),
        )
    }
    pad = "<|vision_start|><|{}_pad|><|vision_end|>"
    norm = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    pixels = {"shortest_edge": 56 * 56, "longest_edge": 336 * 336}
    return (
        model,
        config(vision_config=vision | {"patch_size": patch}, text_config=text_settings(QWEN) | text, **ids),
        processor(
            Qwen2VLImageProcessor(size=pixels, patch_size=patch, **norm),
            QWEN,
            video(size=pixels | {"longest_edge": 8 * 112 * 112}, patch_size=patch, **norm),
            chat_template=TEMPLATE.format(image=pad.format("image"), video=pad.format("video")),
        ),
    )


def _qwen2() -> tuple[Any, Any, Any]:
    vision = {"depth": 3, "embed_dim": 64, "num_heads": 4, "hidden_size": 128, "mlp_ratio": 2}
    text = {"rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}}
    return _qwen(
        Qwen2VLForConditionalGeneration, Qwen2VLConfig, Qwen2VLProcessor, Qwen2VLVideoProcessor, vision, text, 14
    )


def _qwen2_5() -> tuple[Any, Any, Any]:
    vision = {
        "depth": 4,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "out_hidden_size": 128,
        "fullatt_block_indexes": [1, 3],
        "window_size": 56,
        "tokens_per_second": 2,
    }
    text = {"rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}}
    return _qwen(
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLConfig,
        Qwen2_5_VLProcessor,
        Qwen2VLVideoProcessor,
        vision,
        text,
        14,
    )


def _qwen3(model: Any, config: Any, text: dict[str, Any]) -> tuple[Any, Any, Any]:
    vision = {
        "depth": 4,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "out_hidden_size": 128,
        "num_position_embeddings": 256,
        "deepstack_visual_indexes": [0, 2],
    }
    rope = {"rope_type": "default", "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    text = {"rope_scaling": rope, "head_dim": 32} | text
    return _qwen(model, config, Qwen3VLProcessor, Qwen3VLVideoProcessor, vision, text, 16)


def _qwen3_5(model: Any, config: Any, layers: list[str], text: dict[str, Any]) -> tuple[Any, Any, Any]:
    vision = {
        "depth": 4,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "out_hidden_size": 128,
        "num_position_embeddings": 256,
    }
    text = qwen3_5_settings(layers) | text
    return _qwen(model, config, Qwen3VLProcessor, Qwen3VLVideoProcessor, vision, text, 16)


def _glm(
    model: Any, config: Any, processors: tuple[Any, Any, Any], text: dict[str, Any], vision: dict[str, Any]
) -> tuple[Any, Any, Any]:
    ids = {
        f"{name}_token_id": GLM.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image", "image"),
            ("video", "video"),
            ("image_start", "begin_of_image"),
            ("image_end", "end_of_image"),
            ("video_start", "begin_of_video"),
            ("video_end", "end_of_video"),
        )
    }
    tower = {"depth": 3, "hidden_size": 64, "num_heads": 4, "out_hidden_size": 128, "image_size": SIDE}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5}
    norm = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    pixels = {"shortest_edge": 2 * 56 * 56, "longest_edge": 2 * 336 * 336}  # of two frames
    pad = "<|begin_of_{0}|><|{0}|><|end_of_{0}|>"
    processor, image, video = processors
    return (
        model,
        config(
            vision_config=tower | {"patch_size": PATCH} | vision,
            text_config=text_settings(GLM) | {"rope_parameters": rope} | text,
            **ids,
        ),
        processor(
            image(size=pixels, patch_size=PATCH, **norm),
            GLM,
            video(size=pixels | {"longest_edge": 8 * 112 * 112}, patch_size=PATCH, **norm),
            chat_template=TEMPLATE.format(image=pad.format("image"), video=pad.format("video")),
        ),
    )


def _glm_ocr() -> tuple[Any, Any, Any]:
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "partial_rotary_factor": 1.0}
    return _glm(
        GlmOcrForConditionalGeneration,
        GlmOcrConfig,
        (Glm46VProcessor, Glm46VImageProcessor, Glm46VVideoProcessor),
        {"rope_parameters": rope, "intermediate_size": 3 * 128},  # vLLM takes it for the merger's
        {"intermediate_size": 128},
    )


def _paddleocr() -> tuple[Any, Any, Any]:
    start, end, pad = "<|IMAGE_START|>", "<|IMAGE_END|>", "<|IMAGE_PLACEHOLDER|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=PADDLE.backend_tokenizer,
        extra_special_tokens={"image_token": pad},
        **PADDLE.special_tokens_map,
    )
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6]}
    config = PaddleOCRVLConfig(
        vision_config=tower_config(dict),
        text_config=text_settings(PADDLE) | {"rope_parameters": rope, "head_dim": 32, "tie_word_embeddings": False},
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


_MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
}
_SHARED = _MOE | {"shared_expert_intermediate_size": 64}
_GLM_MOE = {
    "head_dim": 32,
    "n_routed_experts": 4,
    "use_qk_norm": False,  # checkpoints say it; transformers does not know it, and vLLM has no default
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
}
_GLM4V = (Glm4vProcessor, Glm4vImageProcessor, Glm4vVideoProcessor)
FAMILIES: dict[str, Callable[[], tuple[Any, Any, Any]]] = {
    "llava": lambda: _llava(CLIPVisionConfig),
    "llava_siglip": lambda: _llava(SiglipVisionConfig),
    "llava_next": lambda: _llava_next(LlamaConfig),
    "llava_next_mistral": lambda: _llava_next(MistralConfig),
    "llava_onevision": _llava_onevision,
    **GENERIC,
    "llava_onevision2": lambda: _qwen(
        LlavaOnevision2ForConditionalGeneration,
        LlavaOnevision2Config,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
        VISION,
        {"head_dim": 32},
        PATCH,
    ),
    "qwen2_vl": _qwen2,
    "qwen2_5_vl": _qwen2_5,
    "qwen3_vl": lambda: _qwen3(Qwen3VLForConditionalGeneration, Qwen3VLConfig, {}),
    "qwen3_vl_moe": lambda: _qwen3(Qwen3VLMoeForConditionalGeneration, Qwen3VLMoeConfig, _MOE),
    "qwen3_5": lambda: _qwen3_5(Qwen3_5ForConditionalGeneration, Qwen3_5Config, LINEAR, {}),
    "qwen3_5_full": lambda: _qwen3_5(Qwen3_5ForConditionalGeneration, Qwen3_5Config, FULL, {}),
    "qwen3_5_moe": lambda: _qwen3_5(Qwen3_5MoeForConditionalGeneration, Qwen3_5MoeConfig, LINEAR, _SHARED),
    "glm4v": lambda: _glm(Glm4vForConditionalGeneration, Glm4vConfig, _GLM4V, {}, {"intermediate_size": 96}),
    "glm4v_moe": lambda: _glm(
        Glm4vMoeForConditionalGeneration, Glm4vMoeConfig, _GLM4V, _GLM_MOE, {"intermediate_size": 96}
    ),
    "glm_ocr": _glm_ocr,
    "paddleocr_vl": _paddleocr,
}

# Of these the checkpoint is of several files, with the names of transformers 4.52 and later.
LATER = ("llava_next_mistral", "qwen2_vl")
# What makes of these checkpoints those that others publish, of which some bring code of their own.
PUBLISHED: dict[str, Callable[[Path], None]] = {
    "internvl_chat": opengvlab,
    "kimi_k25": kimi_k25,
    "kimi_vl": kimi_vl,
    "llava_onevision2": lmms_lab,
    "pixtral": mistral,
}
OWN_CODE = ("internvl_chat", "kimi_vl", "llava_onevision2")
WITHOUT_IMAGE = ("llava_next_video",)
WITHOUT_VIDEO = (
    *("llava", "llava_siglip", "llava_next", "llava_next_mistral"),
    *("gemma3", "kimi_k25", "kimi_vl", "mistral3", "paddleocr_vl", "pixtral"),
)
# Most layers of these have linear attention, which vLLM has in bfloat16 only on a CPU. Others are the same models with
# full attention in all layers; vLLM takes them without prefix cache.
HYBRID = ("minicpmv4_6", "qwen3_5", "qwen3_5_moe")
ALL_FULL = ("minicpmv4_6_full", "qwen3_5_full")
LATENT = ("kimi_k25", "kimi_vl")  # whose attention vLLM has without chunks and prefix cache on a CPU, and of one size
NOT_TOGETHER = ("llava_onevision",)  # are videos of different lengths: vLLM, stock or not, fails over both in a step
ONE_VIDEO = ("glm4v", "glm4v_moe", "glm_ocr")  # is the most that vLLM lets them have in a prompt


def _hub(name: str, weight: torch.Tensor, tower: str) -> tuple[str, torch.Tensor]:
    """A weight that transformers saves as the hub has it."""
    if ".experts." in name and weight.ndim == 3:
        weight = weight.transpose(1, 2).contiguous()
    if tower in ("clip_vision_model", "siglip_vision_model"):
        name = name.replace("vision_tower.", "vision_tower.vision_model.")
    if tower == "kimi_k25_vision":
        name = hub_name(name)
    return name, weight


def later_name(name: str) -> str:
    """The name of a weight in checkpoints saved by transformers 4.52 and later."""
    if name.startswith(("visual.", "vision_tower.", "multi_modal_projector.", "image_newline")):
        return f"model.{name}"
    if name.startswith("language_model."):
        return name.replace("language_model.model.", "model.language_model.").removeprefix("language_model.")
    return re.sub(r"^model\.(?!language_model|visual)", "model.language_model.", name)


def make_family(name: str, folder: Path) -> Path:
    """Write a checkpoint, its weights named as on the hub, which is what vLLM's loaders know."""
    model_class, config, processor = (FAMILIES | UNLISTED)[name]()
    config.dtype = torch.bfloat16
    config.architectures = [model_class.__name__]
    random_model(model_class, config).to(torch.bfloat16).save_pretrained(folder)
    single = folder / "model.safetensors"
    tower = config.vision_config.model_type
    weights = dict(_hub(stored, weight, tower) for stored, weight in load_file(single).items())
    single.unlink()
    if name in LATER:
        weights = {later_name(stored): weight for stored, weight in weights.items()}
    save_torch_state_dict(weights, folder, max_shard_size="300KB" if name in LATER else "5GB")
    processor.save_pretrained(folder)
    if name in PUBLISHED:
        PUBLISHED[name](folder)
    return folder


def quantize(model: Path, folder: Path) -> Path:
    """Write a checkpoint whose language model is AWQ's, of random weights, and whose tower is left in 16 bit."""
    shutil.copytree(model, folder)
    weights: dict[str, torch.Tensor] = {}
    group = 32
    generator = torch.Generator().manual_seed(0)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, generator=generator)

    for name, weight in load_file(model / "model.safetensors").items():
        if ".layers." not in name or not name.endswith("_proj.weight"):
            weights[name] = weight
            continue
        (wide, long), layer = weight.shape, name.removesuffix("weight")
        weights[f"{layer}qweight"] = integers(long, wide // 8)
        weights[f"{layer}qzeros"] = integers(long // group, wide // 8)
        weights[f"{layer}scales"] = torch.rand(long // group, wide, generator=generator).half() / 100
    save_file(weights, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    awq = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    config["quantization_config"] = awq | {"modules_to_not_convert": ["visual"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_lora(model: Path, folder: Path, *modules: str) -> None:
    """Write an adapter of a model with random weights for all its linear layers that are called so."""
    weights: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for name, weight in load_file(model / "model.safetensors").items():
        if any(name.endswith(f"{module}.weight") for module in modules):
            before = f"base_model.model.{name.removesuffix('.weight')}"
            weights[f"{before}.lora_A.weight"] = torch.randn(8, weight.shape[1], generator=generator) * 0.2
            weights[f"{before}.lora_B.weight"] = torch.randn(weight.shape[0], 8, generator=generator) * 0.2
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors")
    names = sorted({module.rpartition(".")[2] for module in modules})
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": names, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"task_type": "CAUSAL_LM"}))
