"""MiniCPM-V 4.6 (slices of an image after the whole of it, and a language model of Qwen3.5's).

That has M-RoPE, but vLLM, as the model was trained, numbers tokens one after the other: those that are left, then.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from typing_extensions import override
from vllm.model_executor.models import minicpmv, minicpmv4_6
from vllm.multimodal import MULTIMODAL_REGISTRY

from eadaprune_vllm.models.base import PruningProcessor
from eadaprune_vllm.models.pruned import Pruned
from eadaprune_vllm.prune import Layout


class PrunedMiniCPMV4_6Processor(PruningProcessor, minicpmv4_6.MiniCPMV4_6MultiModalProcessor):
    """MiniCPM-V 4.6's processor, pruning."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedMiniCPMV4_6Processor,
    info=minicpmv4_6.MiniCPMV4_6ProcessingInfo,
    dummy_inputs=minicpmv.MiniCPMVDummyInputsBuilder,
)
class PrunedMiniCPMV4_6ForConditionalGeneration(Pruned, minicpmv4_6.MiniCPMV4_6ForConditionalGeneration):
    """MiniCPM-V 4.6, pruned."""

    eadaprune_observes: ClassVar[bool] = False
    eadaprune_takes_embeddings: ClassVar[bool] = False

    @override
    @classmethod
    def eadaprune_layout(cls, config: Any, modality: str, data: Mapping[str, Any], num_placeholders: int) -> Layout:
        of_video = modality == "video"
        pictures = len(data["video_image_sizes"]) if of_video else 1
        slices = data["video_tgt_sizes" if of_video else "tgt_sizes"]  # height and width of each, in patches
        merged = math.isqrt(int(slices.prod(1).sum()) // num_placeholders)  # 4, or 2 if the request says so
        part = torch.arange(len(slices)).repeat_interleave(slices.prod(1) // merged**2)
        grids = tuple((height, width) for height, width in (slices // merged).tolist())
        # Where in a picture its slices lie is not said.
        return Layout(part, grids if len(grids) == pictures else ((1, num_placeholders),))
