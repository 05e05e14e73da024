"""LLaVA-OneVision (SigLIP tower over tiles or frames, then a projector, then interpolation or pooling).

Interpolation and pooling mix tokens after the projector, so budget and selection use the final embeddings.
"""

from collections.abc import Mapping
from typing import Any

import torch
from typing_extensions import override
from vllm.model_executor.models import llava_onevision
from vllm.multimodal import MULTIMODAL_REGISTRY

from eadaprune_vllm.core.layout import Layout, Newlines
from eadaprune_vllm.frontend.processor import PruningProcessor
from eadaprune_vllm.models.llava_next import Tiled


class PrunedLlavaOnevisionProcessor(PruningProcessor, llava_onevision.LlavaOnevisionMultiModalProcessor):
    """LLaVA-OneVision's processor, pruning."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedLlavaOnevisionProcessor,
    info=llava_onevision.LlavaOnevisionProcessingInfo,
    dummy_inputs=llava_onevision.LlavaOnevisionDummyInputsBuilder,
)
class PrunedLlavaOnevisionForConditionalGeneration(Tiled, llava_onevision.LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision, pruned: LLaVA-NeXT's images, and videos, each frame of which is pooled."""

    eadaprune_modalities = ("image", "video")
    newline_is_argument = True

    @override
    @classmethod
    def eadaprune_layout(cls, config: Any, modality: str, data: Mapping[str, Any], num_placeholders: int) -> Layout:
        if modality == "image":
            return super().eadaprune_layout(config, modality, data, num_placeholders)
        frames = len(data["pixel_values_videos"])
        length = (num_placeholders - 1) // frames
        side = round(length**0.5)
        part = torch.arange(frames).repeat_interleave(length)
        last = torch.arange(num_placeholders) == num_placeholders - 1
        return Layout(part, ((side, side),) * frames, Newlines(last, torch.zeros_like(part)))

    @override
    def eadaprune_token_scores(self, modality: str, data: Mapping[str, Any], attention: torch.Tensor) -> torch.Tensor:
        if modality == "image":
            return super().eadaprune_token_scores(modality, data, attention)
        frames = self.eadaprune_patch_attention(attention, len(data["pixel_values_videos"]))
        pooled: torch.Tensor = self.apply_pooling(frames[..., None])
        return pooled.flatten()
