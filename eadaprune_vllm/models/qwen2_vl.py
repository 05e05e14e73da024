"""Qwen2-VL (dynamic resolution, merger in the front end, M-RoPE positions as unpruned)."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from transformers.vision_utils import get_vision_cu_seqlens
from vllm.config import VllmConfig
from vllm.model_executor.models import qwen2_vl
from vllm.multimodal import MULTIMODAL_REGISTRY

from eadaprune_vllm.encoder import VisionEncoder, drawn, observed, observing
from eadaprune_vllm.models.base import PruningProcessor
from eadaprune_vllm.models.towerless import Towerless, UnprunedPositions, instead, nothing, without
from eadaprune_vllm.prune import Encoding
from eadaprune_vllm.selectors import VisualTokens


class QwenVisionEncoder(VisionEncoder):
    """Tower and merger of a Qwen-VL model. Its tokens are merged from groups of neighbouring patches."""

    modalities = ("image", "video")
    projected = True
    takes_embeddings = True
    tower_class: Any

    def __init__(self, hf_config: Any) -> None:
        super().__init__(hf_config)
        self.visual = self.tower_class(observed(hf_config.vision_config))

    @torch.inference_mode()
    def encode(self, inputs: Mapping[str, Any]) -> Encoding:
        pixels = inputs["pixel_values"] if "pixel_values" in inputs else inputs["pixel_values_videos"]
        grid = _grid(inputs)
        with observing(self.visual.blocks[-1].attn) as calls:
            output = self.visual(pixels.to(self.dtype), grid_thw=grid.to(pixels.device), **self.lengths(grid))
        patches = torch.cat([drawn(query, key, scale) for (query,), (key,), scale in calls])
        attention = patches.view(len(output.pooler_output), -1).mean(1)
        tokens = VisualTokens(output.pooler_output, self.in_raster_order(attention, grid))
        return self._encoding(tokens, self.rows(output), inputs)

    def embedded(self, embeddings: torch.Tensor, inputs: Mapping[str, Any]) -> Encoding:
        (frames, height, width), merged = _grid(inputs)[0].tolist(), self.hf_config.vision_config.spatial_merge_size
        due = frames * height * width // merged**2, self.row_width(self.hf_config)
        if embeddings.shape != due or min(frames, height, width) < 1 or ("image_grid_thw" in inputs and frames > 1):
            raise ValueError(
                f"embeddings of shape {tuple(embeddings.shape)} do not go with a grid of {frames} x {height} x {width}"
            )
        features = embeddings[:, : self.feature_width(self.hf_config)]
        return self._encoding(VisualTokens(features, None), embeddings, inputs)

    @classmethod
    def feature_width(cls, hf_config: Any) -> int:
        """How many numbers the merger makes of each token."""
        return int(hf_config.vision_config.out_hidden_size)

    @classmethod
    def row_width(cls, hf_config: Any) -> int:
        return cls.feature_width(hf_config)

    def rows(self, output: Any) -> torch.Tensor | None:
        """What of the tower's output the engine is sent, if not what the merger makes."""
        return None

    def lengths(self, grid: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the tower would otherwise compute on its own device. Every block reads the lengths of its sequences,
        for which it would wait for a GPU.

        Args:
            grid: ``[1, 3]``, on the CPU.
        """
        return {"cu_seqlens": get_vision_cu_seqlens(grid)}

    def in_raster_order(self, attention: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        """Args:
        attention: ``[N]``, in the order of the last block.
        grid: ``[1, 3]``, patches in time, height and width.
        """
        return attention

    def _encoding(self, tokens: VisualTokens, rows: torch.Tensor | None, inputs: Mapping[str, Any]) -> Encoding:
        merged = self.hf_config.vision_config.spatial_merge_size
        frames, *sides = _grid(inputs)[0].tolist()
        height, width = (side // merged for side in sides)
        part = torch.arange(frames).repeat_interleave(height * width)
        # Positions go on after the longest side of every frame; in Qwen2.5-VL they also go with time.
        speed = getattr(self.hf_config.vision_config, "tokens_per_second", 1)
        seconds = max(float(second) for second in inputs.get("second_per_grid_ts", (1,)))
        extent = max(frames * max(height, width), math.ceil((frames - 1) * seconds * speed) + max(height, width))
        return Encoding(tokens, part, ((height, width),) * frames, rows=rows, extent=extent)


def _grid(inputs: Mapping[str, Any]) -> torch.Tensor:
    grid: torch.Tensor = inputs["image_grid_thw"] if "image_grid_thw" in inputs else inputs["video_grid_thw"]
    return grid


class Qwen2VLVisionEncoder(QwenVisionEncoder):
    """Qwen2-VL's."""

    tower_class = Qwen2VisionTransformerPretrainedModel

    @classmethod
    def feature_width(cls, hf_config: Any) -> int:
        return int(hf_config.vision_config.hidden_size)


class PrunedQwen2VLProcessor(PruningProcessor, qwen2_vl.Qwen2VLMultiModalProcessor):
    """Qwen2-VL's processor, pruning."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen2VLProcessor, info=qwen2_vl.Qwen2VLProcessingInfo, dummy_inputs=qwen2_vl.Qwen2VLDummyInputsBuilder
)
class PrunedQwen2VLForConditionalGeneration(Towerless, UnprunedPositions, qwen2_vl.Qwen2VLForConditionalGeneration):
    """Modifications:
    - has no vision tower and skips its weights
    """

    encoder = Qwen2VLVisionEncoder
    supports_tower_connector_lora = False
    supports_mm_device_do_normalize = False
    hf_to_vllm_mapper = without(qwen2_vl.Qwen2VLForConditionalGeneration, "visual.")

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        with instead(qwen2_vl, Qwen2VisionTransformer=nothing):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
