"""Kimi K2.5: vLLM takes images and videos as vision chunks, whose frames become one grid of tokens."""

from typing import ClassVar

from vllm.model_executor.models.kimi_k25 import (
    KimiK25DummyInputsBuilder,
    KimiK25ForConditionalGeneration,
    KimiK25MultiModalProcessor,
    KimiK25ProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from eadaprune_vllm.core.options import CHUNK
from eadaprune_vllm.frontend.processor import PruningProcessor
from eadaprune_vllm.models.kimi_vl import KimiTower


class PrunedKimiK25Processor(PruningProcessor, KimiK25MultiModalProcessor):
    """Kimi's processor, pruning."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedKimiK25Processor, info=KimiK25ProcessingInfo, dummy_inputs=KimiK25DummyInputsBuilder
)
class PrunedKimiK25ForConditionalGeneration(KimiTower, KimiK25ForConditionalGeneration):
    """Kimi K2.5, pruned."""

    eadaprune_modalities: ClassVar[tuple[str, ...]] = (CHUNK,)
    eadaprune_grid: ClassVar[str] = "grid_thws"
