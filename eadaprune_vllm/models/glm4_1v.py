"""GLM-4.1V, 4.5V and 4.6V (as Qwen2-VL, with timestamps between the frames of a video)."""

from typing import ClassVar

from vllm.model_executor.models import glm4_1v
from vllm.multimodal import MULTIMODAL_REGISTRY

from eadaprune_vllm.engine.model import UnprunedPositions
from eadaprune_vllm.frontend.processor import PruningProcessor
from eadaprune_vllm.models.qwen2_vl import QwenTower


class Glm(QwenTower):
    """Mixin for GLM-V models."""

    eadaprune_takes_embeddings = False  # they come without a grid
    eadaprune_frame_end: ClassVar[str] = "image_end_token_id"


class PrunedGlm4vProcessor(PruningProcessor, glm4_1v.Glm4vMultiModalProcessor):
    """GLM-V's processor, pruning."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedGlm4vProcessor, info=glm4_1v.Glm4vProcessingInfo, dummy_inputs=glm4_1v.Glm4vDummyInputsBuilder
)
class PrunedGlm4vForConditionalGeneration(Glm, UnprunedPositions, glm4_1v.Glm4vForConditionalGeneration):
    """GLM-4.1V and GLM-4.6V-Flash, pruned."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedGlm4vProcessor, info=glm4_1v.Glm4vProcessingInfo, dummy_inputs=glm4_1v.Glm4vDummyInputsBuilder
)
class PrunedGlm4vMoeForConditionalGeneration(Glm, UnprunedPositions, glm4_1v.Glm4vMoeForConditionalGeneration):
    """GLM-4.5V and GLM-4.6V, mixtures of experts, pruned."""
