"""GLM-OCR (GLM-4.1V with another tower)."""

from typing import ClassVar

from vllm.model_executor.models import glm4_1v, glm_ocr
from vllm.multimodal import MULTIMODAL_REGISTRY

from eadaprune_vllm.engine.model import UnprunedPositions
from eadaprune_vllm.models.glm4_1v import Glm, PrunedGlm4vProcessor


class PrunedGlmOcrProcessor(PrunedGlm4vProcessor):
    """GLM-OCR's processor, pruning."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedGlmOcrProcessor, info=glm4_1v.Glm4vProcessingInfo, dummy_inputs=glm4_1v.Glm4vDummyInputsBuilder
)
class PrunedGlmOcrForConditionalGeneration(Glm, UnprunedPositions, glm_ocr.GlmOcrForConditionalGeneration):
    """GLM-OCR, pruned only if the operator or a request sets a threshold."""

    eadaprune_energy: ClassVar[float | None] = 1.0  # pages of text have the lowest rank, and would lose most
