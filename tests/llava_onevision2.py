"""LLaVA-OneVision 2, which transformers does not know: a tower of its own before transformers' Qwen3.

Weights have the names that they are published with; the folder brings code for its configuration and processors.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import processing_llava_onevision2
import torch
from parts import tower_config
from processing_llava_onevision2 import LlavaOnevision2Config, LlavaOnevision2VisionConfig
from torch import nn
from torch.nn.functional import gelu
from transformers import (
    AutoTokenizer,
    BatchFeature,
    PreTrainedModel,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3Model,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

VISION = tower_config(dict) | {"num_attention_heads": 2, "spatial_merge_size": 2, "layer_norm_eps": 1e-6}
SHARES, THETA = (4, 6, 6), 1e4  # of the angles by which a head is turned: for time, height and width, in sixteenths


class Attend(nn.Module):
    """Attention within one frame."""

    is_causal = False

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, patches: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        of_heads = self.qkv(patches).view(len(patches), 3, self.config.num_attention_heads, -1)
        query, key, value = of_heads.permute(1, 2, 0, 3)[:, None]
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        scaling = value.shape[-1] ** -0.5
        attended, _ = attend(self, _turned(query, angles), _turned(key, angles), value, None, scaling=scaling)
        made: torch.Tensor = self.proj(attended[0].flatten(1))
        return made


def _turned(heads: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Neighbours in pairs, and both by angles of their own: one half of a head has the same angles as the other."""
    even, odd = heads[..., ::2], heads[..., 1::2]
    by_even, by_odd = (angles.repeat(1, 2)[:, first::2] for first in (0, 1))
    turned = even * by_even.cos() - odd * by_even.sin(), odd * by_odd.cos() + even * by_odd.sin()
    return torch.stack(turned, -1).flatten(-2)


class OptionSource(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        size = config.hidden_size
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(size, eps=config.layer_norm_eps) for _ in range(2))
        self.self_attn = Attend(config)
        sides = {"fc1": (size, config.intermediate_size), "fc2": (config.intermediate_size, size)}
        self.mlp = nn.ModuleDict({name: nn.Linear(*of) for name, of in sides.items()})

    def forward(self, patches: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        patches = patches + self.self_attn(self.layer_norm1(patches), angles)
        made: torch.Tensor = patches + self.mlp["fc2"](gelu(self.mlp["fc1"](self.layer_norm2(patches))))
        return made


class Tower(PreTrainedModel):  # type: ignore[misc]
    """Sees each frame by itself."""

    config_class = LlavaOnevision2VisionConfig
    _supports_sdpa = True

    def __init__(self, config: Any, fed: int) -> None:
        super().__init__(config)
        size, patch = config.hidden_size, config.patch_size
        group = size * config.spatial_merge_size**2
        self.embeddings = nn.ModuleDict({"patch_embedding": nn.Conv2d(3, size, patch, patch, bias=False)})
        self.layernorm_pre = nn.LayerNorm(size, eps=config.layer_norm_eps)
        layers = nn.ModuleList(OptionSource(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layers": layers})
        merging = nn.Sequential(nn.Linear(group, group), nn.GELU(), nn.Linear(group, fed))
        self.merger = nn.ModuleDict({"ln_q": nn.LayerNorm(size, eps=config.layer_norm_eps), "mlp": merging})
        self.post_init()

    def forward(self, pixels: torch.Tensor, grid: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tokens of each image or video."""
        frames = [(height, width) for count, height, width in grid.tolist() for _ in range(count)]
        of_frames = torch.split(pixels, [height * width for height, width in frames])
        rows = [self._rows(seen, *size) for seen, size in zip(of_frames, frames, strict=True)]
        counts = (grid.prod(-1) // self.config.spatial_merge_size**2).tolist()
        return torch.split(torch.cat(rows), counts)

    def _rows(self, pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """The tokens of one frame."""
        patch, angles = self.config.patch_size, self._angles(height, width)
        patches = self.embeddings["patch_embedding"](pixels.view(-1, 3, patch, patch)).flatten(1)
        patches = self.layernorm_pre(patches)
        for layer in self.encoder["layers"].children():
            patches = layer(patches, angles)
        groups = self.merger["ln_q"](patches).view(len(patches) // self.config.spatial_merge_size**2, -1)
        rows: torch.Tensor = self.merger["mlp"](groups)
        return rows

    def _angles(self, height: int, width: int) -> torch.Tensor:
        """By which the patches of a frame are turned, ``[n, angles]``, those of a token one after the other, and
        all of them at the same time."""
        side, unit = self.config.spatial_merge_size, self.config.hidden_size // self.config.num_attention_heads // 32
        of_time, *shares = SHARES
        places = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
        of_patches = places.unfold(1, side, side).unfold(2, side, side).reshape(2, -1)
        turned = [
            torch.outer(place, THETA ** -(torch.arange(unit * share) / (unit * share)))
            for place, share in zip(of_patches, shares, strict=True)
        ]
        return torch.cat([torch.zeros(height * width, unit * of_time), *turned], -1)


class LlavaOnevision2Model(nn.Module):
    """The whole of it but the head."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.visual = Tower(config.vision_config, config.text_config.hidden_size)
        self.language_model = Qwen3Model(config.text_config)

    def get_image_features(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> Any:
        return BaseModelOutputWithPooling(pooler_output=self.visual(pixel_values, image_grid_thw))

    get_video_features = get_image_features


class LlavaOnevision2ForConditionalGeneration(PreTrainedModel):  # type: ignore[misc]
    """The whole of it, with what tests use of transformers' models."""

    config_class = LlavaOnevision2Config
    _supports_sdpa = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = LlavaOnevision2Model(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self, input_ids: Any, attention_mask: Any, position_ids: Any, pixel_values: Any, image_grid_thw: Any, **_: Any
    ) -> Any:
        embeds = self.model.language_model.embed_tokens(input_ids)
        rows = self.model.get_image_features(pixel_values, image_grid_thw).pooler_output
        embeds[input_ids == self.config.image_token_id] = torch.cat(rows)
        given = {"attention_mask": attention_mask, "position_ids": position_ids}
        hidden = self.model.language_model(inputs_embeds=embeds, **given).last_hidden_state
        return CausalLMOutput(logits=self.lm_head(hidden))


def lmms_lab(folder: Path) -> None:
    """Make what LMMs-Lab publishes of the checkpoint in this folder."""
    config = json.loads((folder / "config.json").read_text())
    code = Path(processing_llava_onevision2.__file__)
    config["auto_map"] = {"AutoConfig": f"{code.stem}.LlavaOnevision2Config"}
    (folder / "config.json").write_text(json.dumps(config))
    for name in (code.name, f"video_{code.name}"):
        shutil.copy(code, folder / name)
    processors = folder / "processor_config.json"
    pixels = json.loads(processors.read_text())["image_processor"]
    processors.unlink()
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels | {"temporal_patch_size": 1}))


def processor(folder: Path) -> Any:
    """transformers' of Qwen2-VL, which makes the same pixels and prompts, with frames as images."""
    images, tokenizer = Qwen2VLImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    made = Qwen2VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), chat_template=tokenizer.chat_template)
    made.video_processor = _Videos(images)
    return made


class _Videos:
    """Frames as images, the last one twice if there is an odd number."""

    def __init__(self, images: Any) -> None:
        self._images = images

    def __call__(self, videos: Any, **kwargs: Any) -> BatchFeature:
        frames = [*videos, *videos[-1:]][: len(videos) + len(videos) % 2]
        made = self._images(frames, return_tensors="pt")
        _, height, width = made["image_grid_thw"][0].tolist()
        grid = torch.tensor([[len(frames), height, width]])
        return BatchFeature({"pixel_values_videos": made["pixel_values"], "video_grid_thw": grid})
