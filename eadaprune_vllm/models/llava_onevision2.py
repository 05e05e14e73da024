"""LLaVA-OneVision 2 (Qwen2-VL's patches, four merged into a token, and Qwen3's language model without M-RoPE)."""

from collections.abc import Mapping
from typing import Any

import torch
from typing_extensions import override
from vllm.model_executor.models import llava_onevision2
from vllm.multimodal import MULTIMODAL_REGISTRY

from eadaprune_vllm.core.layout import Layout
from eadaprune_vllm.frontend.processor import PruningProcessor
from eadaprune_vllm.models.qwen2_vl import QwenTower


class PrunedLlavaOnevision2Processor(PruningProcessor, llava_onevision2.LlavaOnevision2MultiModalProcessor):
    """LLaVA-OneVision 2's processor, pruning."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedLlavaOnevision2Processor,
    info=llava_onevision2.LlavaOnevision2ProcessingInfo,
    dummy_inputs=llava_onevision2.LlavaOnevision2DummyInputsBuilder,
)
class PrunedLlavaOnevision2ForConditionalGeneration(
    QwenTower, llava_onevision2.LlavaOnevision2ForConditionalGeneration
):
    """LLaVA-OneVision 2, pruned."""

    @override
    @classmethod
    def eadaprune_layout(cls, config: Any, modality: str, data: Mapping[str, Any], num_placeholders: int) -> Layout:
        if modality == "video":  # each frame has a grid, all of one size
            grids = data["video_grid_thw"]
            grid = torch.cat([grids[:, :1].sum(0), grids[0, 1:]])
            data = {**data, "video_grid_thw": grid}
        return super().eadaprune_layout(config, modality, data, num_placeholders)

    @override
    @classmethod
    def eadaprune_embed_width(cls, config: Any) -> int:
        return int(config.text_config.hidden_size)
