"""Kimi K2.5: vLLM takes images and videos as chunks of one kind, whose frames become one grid of tokens."""

from collections.abc import Mapping
from typing import Any, ClassVar

from typing_extensions import override
from vllm.model_executor.models.kimi_k25 import (
    KimiK25DummyInputsBuilder,
    KimiK25ForConditionalGeneration,
    KimiK25MultiModalProcessor,
    KimiK25ProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from eadaprune_vllm.models.base import PruningProcessor
from eadaprune_vllm.models.pruned import Pruned
from eadaprune_vllm.options import CHUNK
from eadaprune_vllm.prune import Layout


class PrunedKimiK25Processor(PruningProcessor, KimiK25MultiModalProcessor):
    """Kimi's processor, pruning."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedKimiK25Processor, info=KimiK25ProcessingInfo, dummy_inputs=KimiK25DummyInputsBuilder
)
class PrunedKimiK25ForConditionalGeneration(Pruned, KimiK25ForConditionalGeneration):
    """Kimi K2.5, pruned."""

    eadaprune_modalities: ClassVar[tuple[str, ...]] = (CHUNK,)
    eadaprune_observes: ClassVar[bool] = False
    eadaprune_takes_embeddings: ClassVar[bool] = False

    @override
    @classmethod
    def eadaprune_layout(cls, config: Any, modality: str, data: Mapping[str, Any], num_placeholders: int) -> Layout:
        _, height, width = data["grid_thws"].tolist()
        rows, columns = config.vision_config.merge_kernel_size
        return Layout.whole(height // rows, width // columns)
