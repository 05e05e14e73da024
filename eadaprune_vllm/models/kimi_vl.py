"""Kimi-VL (MoonViT with dynamic resolution, and DeepSeek's language model)."""

from collections.abc import Mapping
from typing import Any, ClassVar

from typing_extensions import override
from vllm.model_executor.models import kimi_vl
from vllm.multimodal import MULTIMODAL_REGISTRY

from eadaprune_vllm.core.layout import Layout
from eadaprune_vllm.engine.model import Pruned
from eadaprune_vllm.frontend.processor import PruningProcessor


class KimiTower(Pruned):
    """Mixin for Kimi's models, which merge groups of neighbouring patches into tokens.

    Attributes:
        eadaprune_grid: name of the field with the number of patches along each side.
    """

    eadaprune_captures_attention: ClassVar[bool] = False
    eadaprune_takes_embeddings: ClassVar[bool] = False
    eadaprune_grid: ClassVar[str]

    @override
    @classmethod
    def eadaprune_layout(cls, config: Any, modality: str, data: Mapping[str, Any], num_placeholders: int) -> Layout:
        *_, height, width = data[cls.eadaprune_grid].tolist()
        rows, columns = config.vision_config.merge_kernel_size
        return Layout.whole(height // rows, width // columns)


class PrunedKimiVLProcessor(PruningProcessor, kimi_vl.KimiVLMultiModalProcessor):
    """Kimi-VL's processor, pruning."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedKimiVLProcessor, info=kimi_vl.KimiVLProcessingInfo, dummy_inputs=kimi_vl.KimiVLDummyInputsBuilder
)
class PrunedKimiVLForConditionalGeneration(KimiTower, kimi_vl.KimiVLForConditionalGeneration):
    """Kimi-VL, pruned."""

    eadaprune_modalities: ClassVar[tuple[str, ...]] = ("image",)
    eadaprune_grid: ClassVar[str] = "image_grid_hws"
