"""Molmo 2, which transformers does not know: made of its SigLIP and Qwen3, and of what is between them.

The checkpoint that vLLM reads is made of that model's: weights have other names, and the folder brings code of its own.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import processing_molmo2
import torch
from parts import ORIGINAL, PATCH, SIDE, TEMPLATE, renamed, text_settings, tower_config
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import embedding, scaled_dot_product_attention, silu
from transformers import (
    LlavaConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from eadaprune_vllm.core.layout import Layout, Newlines
from eadaprune_vllm.core.prune import Encoding
from eadaprune_vllm.core.selectors import VisualTokens
from eadaprune_vllm.demo.model import byte_tokenizer

WORDS, MORE = 304, 16  # tokens that answers are made of, and others
# What the configuration calls a token -> what the tokenizer does.
TOKENS = {
    "image_patch_id": "<im_patch>",
    "image_low_res_id": "<im_low>",
    "image_start_token_id": "<im_start>",
    "low_res_image_start_token_id": "<low_res_im_start>",
    "frame_start_token_id": "<frame_start>",
    "image_end_token_id": "<im_end>",
    "frame_end_token_id": "<frame_end>",
    "image_col_id": "<im_col>",
}
VIT_LAYERS, PROJECTED = [-1, -3], 96
# Of weights of the language model, here those that are one there.
FUSED = {
    "att_proj": ("q_proj", "k_proj", "v_proj"),
    "ff_proj": ("up_proj", "gate_proj"),
}
# Of all weights, here and there.
NAMES = {
    "vision_tower.vision_model.": "model.vision_backbone.image_vit.",
    "image_pooling_2d.": "model.vision_backbone.image_pooling_2d.",
    "image_projector.": "model.vision_backbone.image_projector.",
    "embeddings.patch_embedding": "patch_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "encoder.layers.": "transformer.resblocks.",
    **{f"self_attn.{name}_proj": f"attention.w{name}" for name in "qkv"},
    "self_attn.out_proj": "attention.wo",
    "mlp.fc": "feed_forward.w",
    "layer_norm1": "attention_norm",
    "layer_norm2": "ffn_norm",
    "language_model.lm_head": "lm_head",
    "language_model.model.layers.": "model.transformer.blocks.",
    "language_model.model.embed_tokens.weight": "model.transformer.wte.embedding",
    "more_embed_tokens.weight": "model.transformer.wte.new_embedding",
    "language_model.model.norm": "model.transformer.ln_f",
    "o_proj": "attn_out",
    "down_proj": "ff_out",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
}


class Molmo2ForConditionalGeneration(PreTrainedModel):  # type: ignore[misc]
    """The whole of it, with what tests use of transformers' models."""

    config_class = LlavaConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        wide, hidden, fed = config.vision_config.hidden_size, PROJECTED, config.text_config.hidden_size
        self.vision_tower = SiglipVisionModel(config.vision_config)
        pooled = {name: nn.Linear(len(VIT_LAYERS) * wide, wide) for name in ("wq", "wk", "wv")}
        self.image_pooling_2d = nn.ModuleDict(pooled | {"wo": nn.Linear(wide, wide)})
        sides = {"w1": (wide, hidden), "w2": (hidden, fed), "w3": (wide, hidden)}
        self.image_projector = nn.ModuleDict({name: nn.Linear(*of, bias=False) for name, of in sides.items()})
        self.language_model = Qwen3ForCausalLM(config.text_config)
        self.more_embed_tokens = nn.Embedding(MORE, fed)
        self.post_init()

    @property
    def model(self) -> "Molmo2ForConditionalGeneration":
        return self

    def _pooled(self, pixels: torch.Tensor, pooling: torch.Tensor) -> torch.Tensor:
        """What the language model is fed with for each group of patches ``[N, pooled]``, -1 for none."""
        side, patch = SIDE // PATCH, PATCH
        pictures = pixels.view(-1, side, side, patch, patch, 3).permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, SIDE, SIDE)
        states = self.vision_tower(pictures, output_hidden_states=True).hidden_states[1:]
        seen = torch.cat([states[layer] for layer in VIT_LAYERS], -1).flatten(0, 1)
        is_patch = pooling >= 0
        patches = seen[pooling.clamp(0)] * is_patch[..., None]
        mean = patches.sum(1, keepdim=True) / is_patch.sum(1)[:, None, None]
        layers, heads = self.image_pooling_2d, self.config.vision_config.num_attention_heads
        query, key, value = (
            layers[name](given).unflatten(-1, (heads, -1)).transpose(1, 2)
            for name, given in (("wq", mean), ("wk", patches), ("wv", patches))
        )
        drawn = scaled_dot_product_attention(query, key, value, attn_mask=is_patch[:, None, None])
        rows, project = layers["wo"](drawn.flatten(1)), self.image_projector
        fed: torch.Tensor = project["w2"](silu(project["w1"](rows)) * project["w3"](rows))
        return fed

    def get_image_features(self, pixel_values: Any, image_token_pooling: Any, image_grids: Any, **_: Any) -> Any:
        """With what begins and ends pictures and lines, as the language model is fed with it."""
        ids = self._laid_out(*image_grids.tolist())[0]
        return BaseModelOutputWithPooling(pooler_output=(self._fed(ids, pixel_values, image_token_pooling),))

    def encoding(self, inputs: Mapping[str, Any]) -> Encoding:
        """Of one image or video, of which the processor made these inputs."""
        modality, pixels = ("video", "pixel_values_videos") if "video_grids" in inputs else ("image", "pixel_values")
        rows = self._pooled(inputs[pixels], inputs[f"{modality}_token_pooling"])
        return Encoding(VisualTokens(rows, None), self._laid_out(*inputs[f"{modality}_grids"].tolist())[1])

    def _laid_out(self, grid: list[int]) -> tuple[torch.Tensor, Layout]:
        """The placeholders of an image or video of such a grid, and where they are."""
        config = self.config
        whole = config.low_res_image_start_token_id, *grid[:2], [], config.image_end_token_id
        finer = config.image_start_token_id, *grid[2:], [config.image_col_id], config.image_end_token_id
        frame = config.frame_start_token_id, *grid[1:], [], config.frame_end_token_id
        pictures = [whole, finer] if len(grid) == 4 else [frame] * grid[0]
        ids: list[int] = []
        part: list[int] = []
        line: list[int] = []
        for number, (start, height, width, ends_line, end) in enumerate(pictures):
            ids.append(start)
            for _ in range(height):
                part += [number] * width
                line += [len(ids) - len(line) if ends_line else -1] * width
                ids += [config.image_patch_id] * width + ends_line
            ids.append(end)
        found = torch.tensor(ids)
        grids = tuple((height, width) for _, height, width, *_ in pictures)
        newlines = Newlines(found != config.image_patch_id, torch.tensor(line))
        return found, Layout(torch.tensor(part), grids, newlines)

    def _fed(self, ids: torch.Tensor, pixels: torch.Tensor, pooling: torch.Tensor) -> torch.Tensor:
        """Embeddings of these tokens, pixels instead of patches."""
        tables = self.language_model.model.embed_tokens.weight, self.more_embed_tokens.weight
        embeds = embedding(ids, torch.cat(tables))
        embeds[ids == self.config.image_patch_id] = self._pooled(pixels, pooling)
        return embeds

    def forward(self, input_ids: torch.Tensor, attention_mask: Any, position_ids: Any, **item: Any) -> Any:
        embeds = self._fed(input_ids, item["pixel_values"], item["image_token_pooling"])
        return self.language_model(inputs_embeds=embeds, attention_mask=attention_mask, position_ids=position_ids)


def molmo2() -> tuple[Any, Any, Any]:
    """Four patches of an image are a token, and nine of a frame."""
    tokenizer = byte_tokenizer("<|image|>", "<|video|>", vocab_size=WORDS)
    tokenizer.add_tokens([*TOKENS.values()], special_tokens=True)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in TOKENS.items()}
    config = LlavaConfig(
        vision_config=tower_config(SiglipVisionConfig, vision_use_head=False),
        text_config=Qwen3Config(**text_settings(tokenizer) | {"vocab_size": WORDS, "head_dim": 32}),
        placeholder_ids=[*ids.values()],
        **ids,
    )
    own: dict[Any, str] = {
        processing_molmo2.Molmo2ImageProcessor: "AutoImageProcessor",
        processing_molmo2.Molmo2VideoProcessor: "AutoVideoProcessor",
        processing_molmo2.Molmo2Processor: "AutoProcessor",
    }
    for each, auto in own.items():
        each.register_for_auto_class(auto)
    pixels: dict[str, Any] = {"size": {"height": SIDE, "width": SIDE}, "patch_size": PATCH}
    processor = processing_molmo2.Molmo2Processor(
        processing_molmo2.Molmo2ImageProcessor(**pixels),
        processing_molmo2.Molmo2VideoProcessor(**pixels),
        tokenizer,
        chat_template=TEMPLATE.format(image="<|image|>", video="<|video|>"),
    )
    return Molmo2ForConditionalGeneration, config, processor


def ai2(folder: Path) -> None:
    """Make what Ai2 publishes of the checkpoint in this folder, which stays within it."""
    within = folder / ORIGINAL
    within.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.move(folder / name, within)
    config = json.loads((within / "config.json").read_text())
    vision, text = config["vision_config"], config["text_config"]
    heads = {"num_key_value_heads": 4, "head_dim": 16}
    vit = vision | heads | {"image_default_input_size": [SIDE, SIDE], "image_patch_size": PATCH}
    more = {"use_qk_norm": True, "qk_norm_type": "qwen3", "qkv_bias": False, "norm_after": False}
    published = {
        "model_type": "molmo2",
        "auto_map": {"AutoConfig": "processing_molmo2.Molmo2Config"},
        "architectures": ["Molmo2ForConditionalGeneration"],
        "dtype": config["dtype"],
        "vit_config": vit | {"image_num_pos": (SIDE // PATCH) ** 2},
        "adapter_config": heads
        | {name: vision[name] for name in ("hidden_size", "num_attention_heads")}
        | {"vit_layers": VIT_LAYERS, "pooling_attention_mask": True, "hidden_act": "silu"}
        | {"intermediate_size": PROJECTED, "text_hidden_size": text["hidden_size"]},
        "text_config": text
        | more
        | {"additional_vocab_size": MORE, "layer_norm_eps": text["rms_norm_eps"], "rope_scaling_layers": None}
        | {"rope_theta": text["rope_parameters"]["rope_theta"]},
    }
    (folder / "config.json").write_text(json.dumps(published | {name: config[name] for name in TOKENS}))
    weights = load_file(within / "model.safetensors")
    patches = "vision_tower.vision_model.embeddings.patch_embedding.weight"
    weights[patches] = weights[patches].permute(0, 2, 3, 1).flatten(1).contiguous()
    for name in [name for name in weights if name.startswith("language_model.")]:
        for fused, (first, *others) in FUSED.items():
            if first in name:
                of_each = [weights.pop(name.replace(first, part)) for part in (first, *others)]
                weights[name.replace(first, fused)] = torch.cat(of_each)
    theirs = {renamed(name, NAMES): weight for name, weight in weights.items() if "post_layernorm" not in name}
    save_file(theirs, folder / "model.safetensors")
