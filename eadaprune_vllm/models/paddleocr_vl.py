"""PaddleOCR-VL (a SigLIP tower of dynamic resolution, M-RoPE positions as unpruned)."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from typing_extensions import override
from vllm.model_executor.models import paddleocr_vl
from vllm.multimodal import MULTIMODAL_REGISTRY

from eadaprune_vllm.engine.model import UnprunedPositions, pool_attention
from eadaprune_vllm.frontend.processor import PruningProcessor
from eadaprune_vllm.models.qwen2_vl import QwenTower


class PrunedPaddleOCRVLProcessor(PruningProcessor, paddleocr_vl.PaddleOCRVLMultiModalProcessor):
    """PaddleOCR-VL's processor, pruning."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedPaddleOCRVLProcessor,
    info=paddleocr_vl.PaddleOCRVLProcessingInfo,
    dummy_inputs=paddleocr_vl.PaddleOCRVLDummyInputsBuilder,
)
class PrunedPaddleOCRVLForConditionalGeneration(
    QwenTower, UnprunedPositions, paddleocr_vl.PaddleOCRVLForConditionalGeneration
):
    """PaddleOCR-VL, pruned only if the operator or a request sets a threshold."""

    eadaprune_modalities: ClassVar[tuple[str, ...]] = ("image",)
    eadaprune_takes_embeddings = False  # vLLM's model takes pixels only
    eadaprune_energy: ClassVar[float | None] = 1.0  # pages of text have the lowest rank, and would lose most

    @override
    def eadaprune_token_scores(self, modality: str, data: Mapping[str, Any], attention: torch.Tensor) -> torch.Tensor:
        _, height, width = data["image_grid_thw"].tolist()  # the tower has patches line by line
        merged = self.config.vision_config.spatial_merge_size
        return pool_attention(attention, height // merged, width // merged, merged)
