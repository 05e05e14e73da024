"""MiniCPM-V 4.6 (an image as a whole and in slices, and Qwen3.5's language model).

The language model has M-RoPE, but was trained with consecutive positions, which is how vLLM numbers the kept tokens.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from typing_extensions import override
from vllm.model_executor.models import minicpmv, minicpmv4_6
from vllm.multimodal import MULTIMODAL_REGISTRY

from eadaprune_vllm.core.layout import Layout
from eadaprune_vllm.engine.model import Pruned
from eadaprune_vllm.frontend.processor import PruningProcessor


class MiniCPM(Pruned):
    """Mixin for MiniCPM-V's models from 4.6 on."""

    eadaprune_captures_attention: ClassVar[bool] = False
    eadaprune_takes_embeddings: ClassVar[bool] = False

    @override
    @classmethod
    def eadaprune_layout(cls, config: Any, modality: str, data: Mapping[str, Any], num_placeholders: int) -> Layout:
        pictures = len(data["video_image_sizes"]) if modality == "video" else 1
        grids = slices(modality, data)
        part = torch.arange(len(grids)).repeat_interleave(torch.tensor([height * width for height, width in grids]))
        # Where the slices are in the picture is not known.
        return Layout(part, grids if len(grids) == pictures else ((1, num_placeholders),))


def slices(modality: str, data: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    """Height and width, in tokens, of the slices of an image, or of the frames of a video."""
    prefix = "video_" if modality == "video" else ""
    merged = 4 if data[f"{prefix}use_vit_merger"] else 2  # a request may choose
    return tuple((height, width) for height, width in (data[f"{prefix}tgt_sizes"] // merged).tolist())


class PrunedMiniCPMV4_6Processor(PruningProcessor, minicpmv4_6.MiniCPMV4_6MultiModalProcessor):
    """MiniCPM-V 4.6's processor, pruning."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedMiniCPMV4_6Processor,
    info=minicpmv4_6.MiniCPMV4_6ProcessingInfo,
    dummy_inputs=minicpmv.MiniCPMVDummyInputsBuilder,
)
class PrunedMiniCPMV4_6ForConditionalGeneration(MiniCPM, minicpmv4_6.MiniCPMV4_6ForConditionalGeneration):
    """MiniCPM-V 4.6, pruned."""
