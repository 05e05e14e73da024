"""Qwen3-VL, dense and mixture of experts (Qwen2-VL, plus DeepStack levels and timestamps between frames)."""

from typing import Any

import torch
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeVisionModel
from vllm.config import VllmConfig
from vllm.model_executor.models import qwen3_vl, qwen3_vl_moe
from vllm.multimodal import MULTIMODAL_REGISTRY

from eadaprune_vllm.models.base import PruningProcessor
from eadaprune_vllm.models.qwen2_vl import QwenVisionEncoder
from eadaprune_vllm.models.towerless import Towerless, UnprunedPositions, instead, nothing, without


class Qwen3VLVisionEncoder(QwenVisionEncoder):
    """Qwen3-VL's. A row is what the merger makes of a token, and after it what each DeepStack level adds."""

    tower_class = Qwen3VLVisionModel

    @classmethod
    def row_width(cls, hf_config: Any) -> int:
        return cls.feature_width(hf_config) * (1 + len(hf_config.vision_config.deepstack_visual_indexes))

    def rows(self, output: Any) -> torch.Tensor | None:
        return torch.cat((output.pooler_output, *output.deepstack_features), 1)


class Qwen3VLMoeVisionEncoder(Qwen3VLVisionEncoder):
    """The same of a mixture of experts."""

    tower_class = Qwen3VLMoeVisionModel


class PrunedQwen3VLProcessor(PruningProcessor, qwen3_vl.Qwen3VLMultiModalProcessor):
    """Qwen3-VL's processor, pruning."""


def _positions_factor(_: VllmConfig) -> int:
    """vLLM sizes the table of rotary embeddings for positions below the number of tokens, but those of kept tokens are
    not; this is its factor for prunings of its own."""
    return 4


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen3VLProcessor, info=qwen3_vl.Qwen3VLProcessingInfo, dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder
)
class PrunedQwen3VLForConditionalGeneration(Towerless, UnprunedPositions, qwen3_vl.Qwen3VLForConditionalGeneration):
    """Modifications:
    - has no vision tower and skips its weights
    - its table of rotary embeddings reaches further
    """

    encoder = Qwen3VLVisionEncoder
    supports_tower_connector_lora = False
    supports_mm_device_do_normalize = False
    hf_to_vllm_mapper = without(qwen3_vl.Qwen3VLForConditionalGeneration, "visual.")

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "model") -> None:
        with instead(qwen3_vl, Qwen3_VisionTransformer=nothing, mrope_positions_factor=_positions_factor):
            super().__init__(vllm_config=vllm_config, prefix=prefix)


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen3VLProcessor, info=qwen3_vl_moe.Qwen3VLMoeProcessingInfo, dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder
)
class PrunedQwen3VLMoeForConditionalGeneration(
    Towerless, UnprunedPositions, qwen3_vl_moe.Qwen3VLMoeForConditionalGeneration
):
    """As above."""

    encoder = Qwen3VLMoeVisionEncoder
    supports_tower_connector_lora = False
    supports_mm_device_do_normalize = False
    hf_to_vllm_mapper = without(qwen3_vl_moe.Qwen3VLMoeForConditionalGeneration, "visual.")

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        with instead(qwen3_vl_moe, Qwen3_VisionTransformer=nothing, mrope_positions_factor=_positions_factor):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
