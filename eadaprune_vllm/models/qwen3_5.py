"""Qwen3.5, dense and mixture of experts (Qwen3-VL without DeepStack, before layers most of which are Gated DeltaNet's).

Those layers have a state instead of a KV cache, and no positions: for them a pruned prompt is just a shorter one.
"""

from vllm.config import VllmConfig
from vllm.model_executor.models import qwen3_5
from vllm.model_executor.models.qwen3_vl import Qwen3VLDummyInputsBuilder
from vllm.multimodal import MULTIMODAL_REGISTRY

from eadaprune_vllm.engine.model import UnprunedPositions
from eadaprune_vllm.models.qwen2_vl import QwenTower
from eadaprune_vllm.models.qwen3_vl import PrunedQwen3VLProcessor, more_positions


class PrunedQwen3_5Processor(PrunedQwen3VLProcessor):
    """Qwen3.5's processor, pruning."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen3_5Processor, info=qwen3_5.Qwen3_5ProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class PrunedQwen3_5ForConditionalGeneration(QwenTower, UnprunedPositions, qwen3_5.Qwen3_5ForConditionalGeneration):
    """Qwen3.5, pruned."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "model") -> None:
        with more_positions(qwen3_5):
            super().__init__(vllm_config=vllm_config, prefix=prefix)


@MULTIMODAL_REGISTRY.register_processor(
    PrunedQwen3_5Processor, info=qwen3_5.Qwen3_5MoeProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class PrunedQwen3_5MoeForConditionalGeneration(
    QwenTower, UnprunedPositions, qwen3_5.Qwen3_5MoeForConditionalGeneration
):
    """Qwen3.5 as a mixture of experts, pruned."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "model") -> None:
        with more_positions(qwen3_5):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
