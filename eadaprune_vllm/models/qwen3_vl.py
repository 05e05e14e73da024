"""Qwen3-VL, dense and mixture of experts (Qwen2-VL, plus DeepStack levels and timestamps between frames)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from typing_extensions import override
from vllm.config import VllmConfig
from vllm.model_executor.models import qwen3_vl, qwen3_vl_moe
from vllm.multimodal import MULTIMODAL_REGISTRY

from eadaprune_vllm.engine.model import UnprunedPositions
from eadaprune_vllm.frontend.processor import PruningProcessor
from eadaprune_vllm.models.qwen2_vl import QwenTower


class Qwen3Tower(QwenTower):
    """Mixin for Qwen3-VL models.

    Modifications:
    - budget and selection use the output of the merger, without the DeepStack levels, which follow in each embedding
    """

    @override
    @classmethod
    def eadaprune_embed_width(cls, config: Any) -> int:
        return super().eadaprune_embed_width(config) * (1 + len(config.vision_config.deepstack_visual_indexes))

    @override
    def eadaprune_features(self, embeds: torch.Tensor) -> torch.Tensor:
        return embeds[:, : self.config.vision_config.out_hidden_size]


class PrunedQwen3VLProcessor(PruningProcessor, qwen3_vl.Qwen3VLMultiModalProcessor):
    """Qwen3-VL's processor, pruning."""


@contextmanager
def more_positions(module: Any) -> Iterator[None]:
    """Context manager: models built meanwhile have a larger table of rotary embeddings. vLLM's has as many positions as
    a prompt has tokens, but kept tokens have larger positions. 4 is vLLM's factor for its own pruning of videos."""
    original = module.mrope_positions_factor
    module.mrope_positions_factor = lambda _: 4
    try:
        yield
    finally:
        module.mrope_positions_factor = original


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen3VLProcessor, info=qwen3_vl.Qwen3VLProcessingInfo, dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder
)
class PrunedQwen3VLForConditionalGeneration(Qwen3Tower, UnprunedPositions, qwen3_vl.Qwen3VLForConditionalGeneration):
    """Qwen3-VL, pruned."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "model") -> None:
        with more_positions(qwen3_vl):
            super().__init__(vllm_config=vllm_config, prefix=prefix)


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen3VLProcessor, info=qwen3_vl_moe.Qwen3VLMoeProcessingInfo, dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder
)
class PrunedQwen3VLMoeForConditionalGeneration(
    Qwen3Tower, UnprunedPositions, qwen3_vl_moe.Qwen3VLMoeForConditionalGeneration
):
    """Qwen3-VL as a mixture of experts, pruned."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        with more_positions(qwen3_vl_moe):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
