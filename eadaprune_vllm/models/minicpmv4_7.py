"""MiniCPM-V 4.7 (4.6 with M-RoPE: the slices of an image and the whole image share a canvas)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from typing_extensions import override
from vllm.config import VllmConfig
from vllm.model_executor.models import minicpmv, minicpmv4_7, qwen3_5
from vllm.multimodal import MULTIMODAL_REGISTRY

from eadaprune_vllm.core.layout import Layout
from eadaprune_vllm.engine.model import UnprunedPositions
from eadaprune_vllm.frontend.processor import PruningProcessor
from eadaprune_vllm.models.minicpmv4_6 import MiniCPM, slices
from eadaprune_vllm.models.qwen3_vl import more_positions


class PrunedMiniCPMV4_7Processor(PruningProcessor, minicpmv4_7.MiniCPMV4_7MultiModalProcessor):
    """MiniCPM-V 4.7's processor, pruning."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedMiniCPMV4_7Processor,
    info=minicpmv4_7.MiniCPMV4_7ProcessingInfo,
    dummy_inputs=minicpmv.MiniCPMVDummyInputsBuilder,
)
class PrunedMiniCPMV4_7ForConditionalGeneration(
    MiniCPM, UnprunedPositions, minicpmv4_7.MiniCPMV4_7ForConditionalGeneration
):
    """MiniCPM-V 4.7, pruned."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        with more_positions(qwen3_5):
            super().__init__(vllm_config=vllm_config, prefix=prefix)

    @override
    @classmethod
    def eadaprune_layout(cls, config: Any, modality: str, data: Mapping[str, Any], num_placeholders: int) -> Layout:
        layout = super().eadaprune_layout(config, modality, data, num_placeholders)
        # A canvas spans fewer positions; but vLLM numbers all tokens if the text of a prompt has tokens of slices.
        return replace(layout, mrope_span=num_placeholders)

    @override
    def eadaprune_frames(self, modality: str, data: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        lengths = [height * width for height, width in slices(modality, data)]
        return lengths, [self._canvas_special_ids[name] for name in ("im_end_id", "slice_end_id")]

    @override
    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Any) -> tuple[torch.Tensor, int]:
        # Without a canvas vLLM numbers the kept tokens consecutively.
        return super().get_mrope_input_positions(input_tokens, mm_features if self._uses_canvas_mrope else [])
