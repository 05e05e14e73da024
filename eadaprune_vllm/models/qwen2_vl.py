"""Qwen2-VL (dynamic resolution, M-RoPE positions as unpruned)."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from typing_extensions import override
from vllm.model_executor.models import qwen2_vl
from vllm.multimodal import MULTIMODAL_REGISTRY

from eadaprune_vllm.core.layout import Layout
from eadaprune_vllm.engine.model import Pruned, UnprunedPositions
from eadaprune_vllm.frontend.processor import PruningProcessor


class QwenTower(Pruned):
    """Mixin for Qwen-VL models, which merge groups of neighbouring patches into tokens."""

    @override
    @classmethod
    def eadaprune_layout(cls, config: Any, modality: str, data: Mapping[str, Any], num_placeholders: int) -> Layout:
        vision = config.vision_config
        frames, *sides = data[f"{modality}_grid_thw"].tolist()
        height, width = (side // vision.spatial_merge_size for side in sides)
        embeddings = data.get(f"{modality}_embeds")
        if embeddings is not None:
            expected = frames * height * width, cls.eadaprune_embed_width(config)
            if embeddings.shape != expected or min(frames, height, width) < 1 or (modality == "image" and frames > 1):
                raise ValueError(
                    f"embeddings of shape {tuple(embeddings.shape)} do not fit a grid of {frames} x {sides[0]} x "
                    f"{sides[1]}"
                )
        part = torch.arange(frames).repeat_interleave(height * width)
        # A frame spans as many positions as its longest side; in Qwen2.5-VL positions also advance with time.
        speed = getattr(vision, "tokens_per_second", 1)
        seconds = float(data.get("second_per_grid_ts", 1))
        mrope_span = max(frames * max(height, width), math.ceil((frames - 1) * seconds * speed) + max(height, width))
        return Layout(part, ((height, width),) * frames, mrope_span=mrope_span)

    @classmethod
    def eadaprune_embed_width(cls, config: Any) -> int:
        """Width of an embedding, ``W``."""
        return int(config.vision_config.out_hidden_size)

    @override
    def eadaprune_token_scores(self, modality: str, data: Mapping[str, Any], attention: torch.Tensor) -> torch.Tensor:
        return attention.view(-1, self.config.vision_config.spatial_merge_size**2).mean(1)


class PrunedQwen2VLProcessor(PruningProcessor, qwen2_vl.Qwen2VLMultiModalProcessor):
    """Qwen2-VL's processor, pruning."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen2VLProcessor, info=qwen2_vl.Qwen2VLProcessingInfo, dummy_inputs=qwen2_vl.Qwen2VLDummyInputsBuilder
)
class PrunedQwen2VLForConditionalGeneration(QwenTower, UnprunedPositions, qwen2_vl.Qwen2VLForConditionalGeneration):
    """Qwen2-VL, pruned."""

    @override
    @classmethod
    def eadaprune_embed_width(cls, config: Any) -> int:
        return int(config.vision_config.hidden_size)
