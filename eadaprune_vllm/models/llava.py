"""LLaVA-1.5 (CLIP or SigLIP tower, per-token projector). The reference adapter: read this one first."""

from collections.abc import Mapping
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models import llava
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY

from eadaprune_vllm.models.base import ROWS, PruningProcessor, no_tower


class PrunedLlavaProcessingInfo(llava.LlavaProcessingInfo):
    """Modifications:
    - states the most tokens of an image outright; the engine must have room for an unpruned one
    """

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"image": self.get_max_image_tokens()}


class PrunedLlavaProcessor(PruningProcessor, llava.LlavaMultiModalProcessor):
    """LLaVA-1.5's processor, pruning."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedLlavaProcessor, info=PrunedLlavaProcessingInfo, dummy_inputs=llava.LlavaDummyInputsBuilder
)
class PrunedLlavaForConditionalGeneration(llava.LlavaForConditionalGeneration):
    """Modifications:
    - has no vision tower and skips its weights
    - projects the feature rows it is given
    """

    # Here and not in a mixin: vLLM's inspection cache looks at the file of the registered class only.
    supports_tower_connector_lora = False
    supports_mm_device_do_normalize = False

    hf_to_vllm_mapper = llava.LlavaForConditionalGeneration.hf_to_vllm_mapper | WeightsMapper(
        orig_to_new_prefix={"model.vision_tower.": None, "vision_tower.": None}
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        with no_tower(llava, "init_vision_tower_for_llava"):
            super().__init__(vllm_config=vllm_config, prefix=prefix)

    def embed_multimodal(self, **kwargs: Any) -> list[torch.Tensor]:
        rows = kwargs.get(ROWS)
        if rows is None:
            return []
        # [n, k, D] if all images keep equally many tokens, else n tensors [k_i, D]
        projected = self.multi_modal_projector(torch.cat(tuple(rows)))
        return list(projected.split([len(image) for image in rows]))

    def get_mm_mapping(self) -> MultiModelKeys:
        return MultiModelKeys.from_string_field(language_model="language_model", connector="multi_modal_projector")
