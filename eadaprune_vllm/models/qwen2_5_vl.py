"""Qwen2.5-VL (Qwen2-VL with attention in windows)."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import get_vision_window_index
from typing_extensions import override
from vllm.model_executor.models import qwen2_5_vl
from vllm.multimodal import MULTIMODAL_REGISTRY

from eadaprune_vllm.engine.model import UnprunedPositions
from eadaprune_vllm.frontend.processor import PruningProcessor
from eadaprune_vllm.models.qwen2_vl import QwenTower


class PrunedQwen2_5_VLProcessor(PruningProcessor, qwen2_5_vl.Qwen2_5_VLMultiModalProcessor):
    """Qwen2.5-VL's processor, pruning."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen2_5_VLProcessor,
    info=qwen2_5_vl.Qwen2_5_VLProcessingInfo,
    dummy_inputs=qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder,
)
class PrunedQwen2_5_VLForConditionalGeneration(
    QwenTower, UnprunedPositions, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration
):
    """Qwen2.5-VL, pruned."""

    @override
    def eadaprune_token_scores(self, modality: str, data: Mapping[str, Any], attention: torch.Tensor) -> torch.Tensor:
        vision = self.config.vision_config
        order, _ = get_vision_window_index(  # the order of tokens in the tower's blocks
            data[f"{modality}_grid_thw"][None],
            spatial_merge_size=vision.spatial_merge_size,
            window_size=vision.window_size,
            patch_size=vision.patch_size,
        )
        return super().eadaprune_token_scores(modality, data, attention)[order.argsort()]
