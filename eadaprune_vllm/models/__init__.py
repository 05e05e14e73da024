"""The supported architectures: what vLLM calls them -> our class in their place."""

from importlib import import_module
from typing import Any

ARCHITECTURES = {
    "LlavaForConditionalGeneration": "eadaprune_vllm.models.llava:PrunedLlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration": "eadaprune_vllm.models.llava_next:PrunedLlavaNextForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration": (
        "eadaprune_vllm.models.llava_onevision:PrunedLlavaOnevisionForConditionalGeneration"
    ),
    "Qwen2VLForConditionalGeneration": "eadaprune_vllm.models.qwen2_vl:PrunedQwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration": "eadaprune_vllm.models.qwen2_5_vl:PrunedQwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration": "eadaprune_vllm.models.qwen3_vl:PrunedQwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration": "eadaprune_vllm.models.qwen3_vl:PrunedQwen3VLMoeForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration": "eadaprune_vllm.models.qwen3_5:PrunedQwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration": "eadaprune_vllm.models.qwen3_5:PrunedQwen3_5MoeForConditionalGeneration",
    "Glm4vForConditionalGeneration": "eadaprune_vllm.models.glm4_1v:PrunedGlm4vForConditionalGeneration",
    "Glm4vMoeForConditionalGeneration": "eadaprune_vllm.models.glm4_1v:PrunedGlm4vMoeForConditionalGeneration",
    "GlmOcrForConditionalGeneration": "eadaprune_vllm.models.glm_ocr:PrunedGlmOcrForConditionalGeneration",
    "PaddleOCRVLForConditionalGeneration": (
        "eadaprune_vllm.models.paddleocr_vl:PrunedPaddleOCRVLForConditionalGeneration"
    ),
}


def adapter(architecture: str) -> Any:
    """Our class in the place of vLLM's."""
    module, _, name = ARCHITECTURES[architecture].partition(":")
    return getattr(import_module(module), name)
