"""Mistral 3; and as Mistral publishes it (``PixtralForConditionalGeneration``), made of transformers' checkpoint: names
are others, and Mistral's own library makes tokens and pixels."""

import base64
import json
from pathlib import Path
from typing import Any

import torch
from mistral_common.protocol.instruct.chunk import ImageChunk
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from parts import PATCH, SIDE, TEMPLATE, renamed, set_aside, text_settings, tower_config
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    BatchFeature,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralImageProcessor,
    PixtralProcessor,
    PixtralVisionConfig,
)
from vllm.tokenizers.mistral import MistralTokenizer

from eadaprune_vllm.core.draw import data_url
from eadaprune_vllm.demo.model import byte_tokenizer

MISTRAL = byte_tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")
IMAGE_TOKEN = 10  # of Mistral's library
NAMES = {
    "language_model.": "",
    "model.": "",
    "multi_modal_projector.linear_1": "vision_language_adapter.w_in",
    "multi_modal_projector.linear_2": "vision_language_adapter.w_out",
    "multi_modal_projector.norm": "pre_mm_projector_norm",
    "multi_modal_projector.patch_merger": "patch_merger",
    "vision_tower": "vision_encoder",
    "self_attn": "attention",
    "mlp": "feed_forward",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
} | {f"{part}_proj": f"w{part}" for part in "qkvo"}


def mistral3(image_token: int = MISTRAL.convert_tokens_to_ids("[IMG]")) -> tuple[Any, Any, Any]:
    """Four patches are a token."""
    config = Mistral3Config(
        vision_config=tower_config(PixtralVisionConfig, 3 * SIDE, hidden_act="silu"),
        text_config=MistralConfig(**text_settings(MISTRAL), rms_norm_eps=1e-5),
        image_token_index=image_token,
        tie_word_embeddings=False,
    )
    processor = PixtralProcessor(
        PixtralImageProcessor(size={"longest_edge": 3 * SIDE}, patch_size=2 * PATCH),
        MISTRAL,
        patch_size=PATCH,
        spatial_merge_size=2,
        chat_template=TEMPLATE.format(image="[IMG]", video=""),
    )
    return Mistral3ForConditionalGeneration, config, processor


def pixtral() -> tuple[Any, Any, Any]:
    return mistral3(IMAGE_TOKEN)


def mistral(folder: Path) -> None:
    """Make it of the checkpoint in this folder."""
    within = set_aside(folder)
    config = json.loads((within / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    weights = {
        renamed(name, NAMES): _interleaved(weight, (vision if name.startswith("vision") else text)["head_dim"])
        if name.endswith(("q_proj.weight", "k_proj.weight"))
        else weight
        for name, weight in load_file(within / "model.safetensors").items()
    }
    save_file(weights, folder / "consolidated.safetensors")
    encoder = {
        "hidden_size": vision["hidden_size"],
        "num_channels": 3,
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "intermediate_size": vision["intermediate_size"],
        "num_hidden_layers": vision["num_hidden_layers"],
        "num_attention_heads": vision["num_attention_heads"],
        "rope_theta": vision["rope_parameters"]["rope_theta"],
        "image_token_id": IMAGE_TOKEN,
        "adapter_bias": False,
        "mm_projector_id": "patch_merge",
        "spatial_merge_size": config["spatial_merge_size"],
        "add_pre_mm_projector_layer_norm": True,
    }
    params = {
        "dim": text["hidden_size"],
        "n_layers": text["num_hidden_layers"],
        "head_dim": text["head_dim"],
        "hidden_dim": text["intermediate_size"],
        "n_heads": text["num_attention_heads"],
        "n_kv_heads": text["num_key_value_heads"],
        "norm_eps": text["rms_norm_eps"],
        "rope_theta": text["rope_parameters"]["rope_theta"],
        "vocab_size": text["vocab_size"],
        "max_position_embeddings": text["max_position_embeddings"],
        "dtype": config["dtype"],
        "vision_encoder": encoder,
    }
    (folder / "params.json").write_text(json.dumps(params))
    (folder / "tekken.json").write_text(json.dumps(_tekken(text["vocab_size"], encoder)))


def _interleaved(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """With the two halves of each head, which rotary embeddings turn together, one by one."""
    return weight.reshape(-1, 2, head_dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _tekken(size: int, encoder: dict[str, Any]) -> dict[str, Any]:
    """Bytes as tokens, after those that are special."""
    coded = [base64.b64encode(bytes([rank])).decode() for rank in range(256)]
    tokens = [{"rank": rank, "token_bytes": of, "token_str": None} for rank, of in enumerate(coded)]
    return {
        "config": {
            "pattern": r"[\s\S]",
            "num_vocab_tokens": len(tokens),
            "default_vocab_size": size,
            "default_num_special_tokens": size - len(tokens),
            "version": "v7",
        },
        "vocab": tokens,
        "special_tokens": Tekkenizer.DEPRECATED_SPECIAL_TOKENS,
        "image": {
            "image_patch_size": encoder["patch_size"],
            "max_image_size": encoder["image_size"],
            "spatial_merge_size": encoder["spatial_merge_size"],
        },
    }


class Processor:
    """What Mistral's library makes of a chat, as transformers' processor has it."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = MistralTokenizer.from_pretrained(folder)

    def apply_chat_template(self, messages: Any, **kwargs: Any) -> Any:
        return messages

    def __call__(self, text: Any, images: list[Image.Image], **kwargs: Any) -> BatchFeature:
        urls = iter(images)
        content = [
            {"type": "image_url", "image_url": {"url": data_url(next(urls))}} if part["type"] == "image" else part
            for part in text[0]["content"]
        ]
        ids = self._tokenizer.apply_chat_template([{"role": "user", "content": content}])
        return BatchFeature({"input_ids": torch.tensor([ids]), **self.image_processor(images[0])})

    def image_processor(self, image: Image.Image, **kwargs: Any) -> BatchFeature:
        encoded = self._tokenizer.instruct.mm_encoder(ImageChunk(image=image))
        pixels = torch.from_numpy(encoded.image)[None]
        return BatchFeature({"pixel_values": pixels, "image_sizes": torch.tensor([pixels.shape[2:]])})
