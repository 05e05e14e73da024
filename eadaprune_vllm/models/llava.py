"""LLaVA-1.5 (CLIP or SigLIP tower, per-token projector). The reference adapter: read this one first."""

from typing import Any

from PIL import Image
from vllm.config import VllmConfig
from vllm.model_executor.models import llava
from vllm.multimodal import MULTIMODAL_REGISTRY

from eadaprune_vllm import draw
from eadaprune_vllm.encoder import LlavaVisionEncoder
from eadaprune_vllm.models.base import PruningProcessor
from eadaprune_vllm.models.towerless import MaxTokens, Towerless, instead, nothing, without


class PrunedLlavaProcessingInfo(MaxTokens, llava.LlavaProcessingInfo):
    """LLaVA-1.5's."""


class PrunedLlavaProcessor(PruningProcessor, llava.LlavaMultiModalProcessor):
    """LLaVA-1.5's processor, pruning."""

    def view(self, item: Any, count: int, number: int) -> Image.Image:
        return draw.seen(self.info.get_hf_processor().image_processor, item)


@MULTIMODAL_REGISTRY.register_processor(
    PrunedLlavaProcessor, info=PrunedLlavaProcessingInfo, dummy_inputs=llava.LlavaDummyInputsBuilder
)
class PrunedLlavaForConditionalGeneration(Towerless, llava.LlavaForConditionalGeneration):
    """Modifications:
    - has no vision tower and skips its weights
    """

    encoder = LlavaVisionEncoder
    # Here and not in a mixin: vLLM's inspection cache looks at the file of the registered class only.
    supports_tower_connector_lora = False
    supports_mm_device_do_normalize = False
    hf_to_vllm_mapper = without(llava.LlavaForConditionalGeneration, "vision_tower.")

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        with instead(llava, init_vision_tower_for_llava=nothing):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
