"""The supported architectures: vLLM's name -> our class, which replaces vLLM's."""

import os
from importlib import import_module
from typing import Any

_GENERIC = "eadaprune_vllm.models.generic"
_ANY = "EADAPRUNE_ANY_MODEL"  # an environment variable, so that child processes inherit it
ARCHITECTURES = {
    "DeepseekOCRForCausalLM": "eadaprune_vllm.models.deepseek_ocr:PrunedDeepseekOCRForCausalLM",
    "Gemma3ForConditionalGeneration": f"{_GENERIC}:Gemma3ForConditionalGeneration",
    "Gemma4ForConditionalGeneration": f"{_GENERIC}:Gemma4ForConditionalGeneration",
    "Gemma4UnifiedForConditionalGeneration": f"{_GENERIC}:Gemma4UnifiedForConditionalGeneration",
    "Glm4vForConditionalGeneration": "eadaprune_vllm.models.glm4_1v:PrunedGlm4vForConditionalGeneration",
    "Glm4vMoeForConditionalGeneration": "eadaprune_vllm.models.glm4_1v:PrunedGlm4vMoeForConditionalGeneration",
    "GlmOcrForConditionalGeneration": "eadaprune_vllm.models.glm_ocr:PrunedGlmOcrForConditionalGeneration",
    "InternVLChatModel": f"{_GENERIC}:InternVLChatModel",
    "InternVLForConditionalGeneration": f"{_GENERIC}:InternVLForConditionalGeneration",
    "KimiK25ForConditionalGeneration": "eadaprune_vllm.models.kimi_k25:PrunedKimiK25ForConditionalGeneration",
    "KimiVLForConditionalGeneration": "eadaprune_vllm.models.kimi_vl:PrunedKimiVLForConditionalGeneration",
    "LlavaForConditionalGeneration": "eadaprune_vllm.models.llava:PrunedLlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration": "eadaprune_vllm.models.llava_next:PrunedLlavaNextForConditionalGeneration",
    "LlavaNextVideoForConditionalGeneration": f"{_GENERIC}:LlavaNextVideoForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration": (
        "eadaprune_vllm.models.llava_onevision:PrunedLlavaOnevisionForConditionalGeneration"
    ),
    "LlavaOnevision2ForConditionalGeneration": (
        "eadaprune_vllm.models.llava_onevision2:PrunedLlavaOnevision2ForConditionalGeneration"
    ),
    "MiniCPMV4_6ForConditionalGeneration": (
        "eadaprune_vllm.models.minicpmv4_6:PrunedMiniCPMV4_6ForConditionalGeneration"
    ),
    "MiniCPMV4_7ForConditionalGeneration": (
        "eadaprune_vllm.models.minicpmv4_7:PrunedMiniCPMV4_7ForConditionalGeneration"
    ),
    "Mistral3ForConditionalGeneration": "eadaprune_vllm.models.mistral:PrunedMistral3ForConditionalGeneration",
    "Molmo2ForConditionalGeneration": "eadaprune_vllm.models.molmo2:PrunedMolmo2ForConditionalGeneration",
    "PaddleOCRVLForConditionalGeneration": (
        "eadaprune_vllm.models.paddleocr_vl:PrunedPaddleOCRVLForConditionalGeneration"
    ),
    "PixtralForConditionalGeneration": "eadaprune_vllm.models.mistral:PrunedPixtralForConditionalGeneration",
    "Qwen2VLForConditionalGeneration": "eadaprune_vllm.models.qwen2_vl:PrunedQwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration": "eadaprune_vllm.models.qwen2_5_vl:PrunedQwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration": "eadaprune_vllm.models.qwen3_vl:PrunedQwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration": "eadaprune_vllm.models.qwen3_vl:PrunedQwen3VLMoeForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration": "eadaprune_vllm.models.qwen3_5:PrunedQwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForConditionalGeneration": "eadaprune_vllm.models.qwen3_5:PrunedQwen3_5MoeForConditionalGeneration",
}


def register() -> None:
    """Register our classes over vLLM's, in this process."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.registry import _MULTIMODAL_MODELS

    if _ANY in os.environ:
        ARCHITECTURES.update({name: f"{_GENERIC}:{name}" for name in _MULTIMODAL_MODELS.keys() - ARCHITECTURES.keys()})
    for architecture, model in ARCHITECTURES.items():
        ModelRegistry.register_model(architecture, model)


def register_any() -> None:
    """The same for every multimodal architecture that vLLM ships, in this process and its children."""
    os.environ[_ANY] = "1"
    register()


def adapter(architecture: str) -> Any:
    """Our class for an architecture."""
    module, _, name = ARCHITECTURES[architecture].partition(":")
    return getattr(import_module(module), name)
