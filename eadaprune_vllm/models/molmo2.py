"""Molmo 2 (an image as a whole and as a finer picture made of overlapping crops, and Qwen3's language model)."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from typing_extensions import override
from vllm.model_executor.models import molmo2
from vllm.multimodal import MULTIMODAL_REGISTRY

from eadaprune_vllm.core.layout import Layout, Newlines
from eadaprune_vllm.engine.model import Pruned
from eadaprune_vllm.frontend.processor import PruningProcessor


class PrunedMolmo2Processor(PruningProcessor, molmo2.Molmo2MultiModalProcessor):
    """Molmo 2's processor, pruning."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedMolmo2Processor, info=molmo2.Molmo2ProcessingInfo, dummy_inputs=molmo2.Molmo2DummyInputsBuilder
)
class PrunedMolmo2ForConditionalGeneration(Pruned, molmo2.Molmo2ForConditionalGeneration):
    """Molmo 2, pruned."""

    eadaprune_captures_attention: ClassVar[bool] = False  # crops overlap, and are pooled after the tower
    eadaprune_takes_embeddings: ClassVar[bool] = False  # vLLM's model takes pixels only

    @override
    @classmethod
    def eadaprune_layout(cls, config: Any, modality: str, data: Mapping[str, Any], num_placeholders: int) -> Layout:
        """vLLM's placeholders are pooled patches, and text tokens that begin and end each picture, and may end its
        lines."""
        ids = data[f"{modality}_tokens"]
        mask = ids != config.image_patch_id
        ends = (ids == config.image_end_token_id) | (ids == config.frame_end_token_id)
        part, following = ends.cumsum(0)[~mask], mask.cumsum(0)[~mask]
        line = torch.where(ids[mask][following] == config.image_col_id, following, -1)
        grids = []
        for number, length in enumerate(part.bincount().tolist()):
            lines = torch.unique(line[part == number])
            height = math.isqrt(length) if lines[0] < 0 else len(lines)  # the image as a whole is a square
            grids.append((height, length // height))
        return Layout(part, tuple(grids), Newlines(mask, line))
