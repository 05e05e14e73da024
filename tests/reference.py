"""What a server should decide about an image or a video, by transformers' own models."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from generic_families import GENERIC
from independent import check
from llava_onevision2 import LlavaOnevision2ForConditionalGeneration
from molmo2 import Molmo2ForConditionalGeneration
from parts import original
from PIL import Image
from processors import processor
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForImageTextToText
from transformers.image_processing_utils import select_best_resolution
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import get_vision_window_index

from eadaprune_vllm.core.layout import Layout, Newlines
from eadaprune_vllm.core.options import PruneOptions
from eadaprune_vllm.core.prune import Encoding, PruneDecision, prune
from eadaprune_vllm.core.selectors import VisualTokens

# What transformers does not have.
OWN_MODELS = {
    "llava_onevision2": LlavaOnevision2ForConditionalGeneration,
    "molmo2": Molmo2ForConditionalGeneration,
}
# Attention weights [batch, heads, n, n] of each layer, in the order of its calls.
Weights = dict[torch.nn.Module, list[torch.Tensor]]
_noted: list[Weights] = []


def _attend(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Attention as transformers computes it by default. Its weights are noted while they are watched."""
    for weights in _noted:
        products = query.float() @ key.float().transpose(-1, -2) * kwargs["scaling"]
        weights.setdefault(module, []).append(products.softmax(-1))
    return sdpa_attention_forward(module, query, key, *args, **kwargs)


AttentionInterface.register("watched", _attend)
AttentionMaskInterface.register("watched", sdpa_mask)  # or padding would be attended to


@contextmanager
def _watched() -> Iterator[Weights]:
    """While open, attention weights are noted."""
    _noted.append({})
    try:
        yield _noted[-1]
    finally:
        _noted.pop()


def transformers_model(folder: Path, dtype: torch.dtype) -> Any:
    """What transformers makes of a checkpoint, where vLLM computes the same otherwise in vLLM's way."""
    kind = OWN_MODELS.get(folder.name, AutoModelForImageTextToText)
    model = kind.from_pretrained(original(folder), dtype=dtype).eval()
    if model.config.model_type == "paddleocr_vl":
        model.model.visual.vision_model.embeddings.interpolation_align_corners = False
    if model.config.model_type == "gemma4_unified":  # whose images attend to what follows, but not on a CPU
        model.config.text_config.use_bidirectional_attention = None
    return model


def checked(encoding: Encoding, options: PruneOptions) -> PruneDecision:
    """The decision about an image, which is LAPACK's, too."""
    kept = prune(encoding, options)
    check(encoding, options, kept)
    return kept


class Reference:
    """What the engine of a server with ``--dtype dtype`` should decide.

    Attributes:
        model: transformers', without its head.
        image_processor: transformers'.
    """

    def __init__(self, model: Path, dtype: torch.dtype) -> None:
        self.model = transformers_model(model, dtype).model
        self.image_processor = processor(model).image_processor
        if self.model.config.model_type not in GENERIC:
            self._tower = self.model.visual if hasattr(self.model, "visual") else self.model.vision_tower
            self._tower.set_attn_implementation("watched")
        self._dtype = dtype

    def kept(self, image: Image.Image, **options: Any) -> PruneDecision:
        """What stays of an image, with the server's option ``budget`` among these."""
        encoding = self.encode(self.image_processor(image, return_tensors="pt"))
        encoding = replace(encoding, budget=options.pop("budget", "spectrum"))
        return checked(encoding, PruneOptions.model_validate(options))

    @torch.inference_mode()
    def encode(self, inputs: Mapping[str, Any]) -> Encoding:
        """One image or video, of which transformers' processor made these inputs."""
        (modality,) = (name.rpartition("_")[2] for name in inputs if name.startswith("pixel_values"))
        pixels = inputs[f"pixel_values{'_videos' if modality == 'videos' else ''}"].to(self._dtype)
        grid = inputs.get("video_grid_thw" if modality == "videos" else "image_grid_thw")
        if isinstance(self.model, Molmo2ForConditionalGeneration):
            return self.model.encoding(inputs)
        if self.model.config.model_type in GENERIC:  # nothing is known of it but the rows
            return self._of_rows(pixels[0] if pixels.ndim == 5 else pixels, inputs)
        with _watched() as weights:
            if self.model.config.model_type == "mistral3":
                (rows,) = self.model.get_image_features(pixels, inputs["image_sizes"]).pooler_output
                height, width = (inputs["image_sizes"][0] // self.model.config.vision_config.patch_size).tolist()
                return self._of_grid(rows, torch.tensor([[1, height, width]]), weights)
            if grid is not None:
                encode = self.model.get_video_features if modality == "videos" else self.model.get_image_features
                return self._of_grid(torch.cat(encode(pixels, grid).pooler_output), grid, weights)
            if modality == "videos":
                return self._of_frames(pixels[0], weights)
            if "image_sizes" in inputs:
                return self._of_tiles(pixels[0], inputs["image_sizes"], weights)
            (features,), (attention,) = self._patches(pixels), self._drawn(weights)
        return Encoding(VisualTokens(features, attention), Layout.whole(self._side, self._side))

    def inputs(self, image: Image.Image) -> dict[str, Any]:
        """What ``get_image_features`` takes of an image."""
        made = self.image_processor(image, return_tensors="pt")
        unused = ("num_crops", "num_patches", "num_soft_tokens_per_image")
        return {name: value for name, value in made.items() if name not in unused}

    def _of_rows(self, pixels: torch.Tensor, inputs: Mapping[str, Any]) -> Encoding:
        """Of a model of which only the rows are known. Frames are images, but in one model."""
        if self.model.config.model_type == "llava_next_video":
            (made,) = self.model.get_video_features(pixels[None]).pooler_output
        else:
            places = inputs.get("image_position_ids", inputs.get("video_position_ids"))
            given = {name: inputs[name] for name in ("image_sizes", "image_grid_thw") if name in inputs}
            given |= {} if places is None else {"image_position_ids": places}
            slices = inputs.get("target_sizes", inputs.get("target_sizes_videos"))
            given |= {} if slices is None else {"target_sizes": slices}
            made = self.model.get_image_features(pixels, **given).pooler_output
        of_tiles = [*made]
        part = torch.arange(len(of_tiles)).repeat_interleave(torch.tensor([len(rows) for rows in of_tiles]))
        return Encoding(VisualTokens(torch.cat(of_tiles), None), Layout(part, ((1, len(part)),)))

    @property
    def _side(self) -> int:
        """Of a tile, in patches."""
        vision = self.model.config.vision_config
        return int(vision.image_size // vision.patch_size)

    @property
    def _first(self) -> int:
        """The first token of a LLaVA's tower that is a patch."""
        return int(self.model.config.vision_feature_select_strategy == "default")

    def _patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """What a LLaVA's tower makes of the patches of each tile, ``[T, N, D]``."""
        found = self._tower(pixels, output_hidden_states=True).hidden_states[self.model.config.vision_feature_layer]
        patches: torch.Tensor = found[:, self._first :]
        return patches

    def _drawn(self, weights: Weights) -> torch.Tensor:
        """The attention that these patches draw in the last layer that is used, ``[T, N]``."""
        config, layers = self.model.config, list(weights.values())
        (of_layer,) = layers[config.vision_feature_layer % (len(layers) + 1) - 1]
        over_heads = of_layer.mean(1)
        of_cls = config.vision_config.model_type == "clip_vision_model"
        drawn: torch.Tensor = over_heads[:, 0] if of_cls else over_heads.mean(1)
        return drawn[:, self._first :]

    def _of_tiles(self, pixels: torch.Tensor, sizes: torch.Tensor, weights: Weights) -> Encoding:
        features = self._patches(pixels)
        if self.model.config.model_type == "llava_onevision":
            features = self.model.multi_modal_projector(features)
        layout = tiled(self.model, len(pixels), sizes)
        is_token = ~layout.is_newline
        attention = packed(self.model, self._drawn(weights)[..., None], sizes)[is_token, 0]
        return Encoding(VisualTokens(packed(self.model, features, sizes)[is_token], attention), layout)

    def _of_frames(self, pixels: torch.Tensor, weights: Weights) -> Encoding:
        features = self.model.apply_pooling(self.model.multi_modal_projector(self._patches(pixels)))
        attention = self.model.apply_pooling(self._drawn(weights)[..., None])
        frames, length, _ = features.shape
        part = torch.arange(frames)[:, None].expand(-1, length).flatten()
        mask = torch.tensor([False] * frames * length + [True])
        grids = ((math.isqrt(length), math.isqrt(length)),) * frames
        layout = Layout(part, grids, Newlines(mask, torch.zeros_like(part)))
        return Encoding(VisualTokens(features.flatten(0, 1), attention.flatten()), layout)

    def _of_grid(self, features: torch.Tensor, grid: torch.Tensor, weights: Weights) -> Encoding:
        vision = self.model.config.vision_config
        of_layer = list(weights.values())[-1]
        over_patches = torch.cat([of_one.mean((0, 1, 2)) for of_one in of_layer])
        attention = over_patches.view(len(features), -1).mean(1)
        merged = getattr(vision, "spatial_merge_size", None) or self.model.config.spatial_merge_size
        if self.model.config.model_type in ("mistral3", "paddleocr_vl"):  # whose towers see patches line by line
            attention = torch.nn.functional.avg_pool2d(over_patches.view(1, *grid[0, 1:].tolist()), merged).flatten()
        if hasattr(vision, "window_size"):  # which the tower orders tokens by
            order, _ = get_vision_window_index(
                grid, spatial_merge_size=merged, window_size=vision.window_size, patch_size=vision.patch_size
            )
            attention = torch.empty_like(attention).index_copy_(0, order, attention)
        frames, height, width = grid[0].tolist()
        height, width = height // merged, width // merged
        part = torch.arange(frames)[:, None].expand(-1, height * width).flatten()
        return Encoding(VisualTokens(features, attention), Layout(part, ((height, width),) * frames))


def packed(model: Any, of_tiles: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """What transformers makes of the tiles ``[T, N, C]`` of one image of such height and width: ``[placeholders, C]``,
    NaN for newlines."""
    newline = torch.full(of_tiles.shape[-1:], torch.nan)
    more = {"vision_feature_select_strategy": "full"} if model.config.model_type == "llava_next" else {}
    (rows,), _ = model.pack_image_features([of_tiles], sizes, image_newline=newline, **more)
    found: torch.Tensor = rows
    return found


def tiled(model: Any, tiles: int, sizes: torch.Tensor) -> Layout:
    """Where the tokens are of an image in so many tiles. The places of tiles are packed as features of patches are; a
    token that is interpolated from several comes from the nearest one, and half way from the even one."""
    tile = model.config.vision_config.image_size
    side = tile // model.config.vision_config.patch_size
    resolution = select_best_resolution(sizes[0].tolist(), model.config.image_grid_pinpoints)
    width = resolution[1] // tile
    rows, columns = (torch.arange(tiles - 1).div(width, rounding_mode="floor"), torch.arange(tiles - 1) % width)
    places = torch.cat([torch.tensor([[-1, -1]]), torch.stack([rows, columns], -1)]).float()
    found = packed(model, places[:, None].expand(-1, side**2, -1), sizes)
    mask = found[:, 0].isnan()
    place = found[~mask].round().long()
    whole = torch.tensor([-1]).expand(side**2)
    part = torch.cat([whole, place[side**2 :, 0] * width + place[side**2 :, 1]])
    if tiles == 1:
        return Layout(part, ((side, side),), Newlines(mask, torch.zeros_like(part)))
    lines = int(mask.sum())
    length = (len(part) - side**2) // max(lines, 1)
    line = torch.cat([whole, torch.arange(lines).repeat_interleave(length)])
    return Layout(part, ((side, side), *[(lines, length)] * bool(length)), Newlines(mask, line))
