"""Qwen2.5-VL (Qwen2-VL with attention in windows)."""

import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    get_vision_window_index,
)
from vllm.config import VllmConfig
from vllm.model_executor.models import qwen2_5_vl
from vllm.multimodal import MULTIMODAL_REGISTRY

from eadaprune_vllm.models.base import PruningProcessor
from eadaprune_vllm.models.qwen2_vl import QwenVisionEncoder
from eadaprune_vllm.models.towerless import Towerless, UnprunedPositions, instead, nothing, without


class Qwen2_5_VLVisionEncoder(QwenVisionEncoder):
    """Qwen2.5-VL's. Its blocks see the tokens window by window."""

    tower_class = Qwen2_5_VisionTransformerPretrainedModel

    def lengths(self, grid: torch.Tensor) -> dict[str, torch.Tensor]:
        order, lengths = self.windows(grid)
        return super().lengths(grid) | {"window_index": order, "cu_window_seqlens": lengths}

    def in_raster_order(self, attention: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        order, _ = self.windows(grid)
        return attention[order.argsort()]

    def windows(self, grid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The order that windows put tokens in, and where windows end, ``[windows + 1]`` int32 on the CPU.

        Args:
            grid: ``[1, 3]``, on the CPU.
        """
        vision = self.hf_config.vision_config
        order, lengths = get_vision_window_index(
            grid,
            spatial_merge_size=vision.spatial_merge_size,
            window_size=vision.window_size,
            patch_size=vision.patch_size,
        )
        return order, lengths


class PrunedQwen2_5_VLProcessor(PruningProcessor, qwen2_5_vl.Qwen2_5_VLMultiModalProcessor):
    """Qwen2.5-VL's processor, pruning."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen2_5_VLProcessor,
    info=qwen2_5_vl.Qwen2_5_VLProcessingInfo,
    dummy_inputs=qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder,
)
class PrunedQwen2_5_VLForConditionalGeneration(
    Towerless, UnprunedPositions, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration
):
    """Modifications:
    - has no vision tower and skips its weights
    """

    encoder = Qwen2_5_VLVisionEncoder
    supports_tower_connector_lora = False
    supports_mm_device_do_normalize = False
    hf_to_vllm_mapper = without(qwen2_5_vl.Qwen2_5_VLForConditionalGeneration, "visual.")

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        with instead(qwen2_5_vl, Qwen2_5_VisionTransformer=nothing):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
