"""LLaVA-1.5 (CLIP or SigLIP tower, per-token projector). The reference adapter: read this one first."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from PIL import Image
from typing_extensions import override
from vllm.model_executor.models import llava
from vllm.multimodal import MULTIMODAL_REGISTRY

from eadaprune_vllm.core import draw
from eadaprune_vllm.core.layout import Layout
from eadaprune_vllm.engine.model import Pruned
from eadaprune_vllm.frontend.processor import PruningProcessor


class LlavaTower(Pruned):
    """Mixin for models with LLaVA's vision tower.

    Modifications:
    - budget and selection use the input of the projector
    """

    eadaprune_modalities: ClassVar[tuple[str, ...]] = ("image",)

    @property
    def eadaprune_has_cls(self) -> bool:  # type: ignore[override]
        return bool(self.config.vision_config.model_type == "clip_vision_model")

    def eadaprune_patch_attention(self, attention: torch.Tensor, tiles: int) -> torch.Tensor:
        """The attention that the patches of each tile receive, ``[T, N]``, without that of a CLS token."""
        per_tile = attention.view(tiles, -1)
        return per_tile[:, int(self.config.vision_feature_select_strategy == "default") :]


class PrunedLlavaProcessor(PruningProcessor, llava.LlavaMultiModalProcessor):
    """LLaVA-1.5's processor, pruning."""

    @override
    def eadaprune_background(self, item: Any, count: int, number: int) -> Image.Image:
        return draw.preprocessed(self.info.get_hf_processor().image_processor, item)


@MULTIMODAL_REGISTRY.register_processor(
    PrunedLlavaProcessor, info=llava.LlavaProcessingInfo, dummy_inputs=llava.LlavaDummyInputsBuilder
)
class PrunedLlavaForConditionalGeneration(LlavaTower, llava.LlavaForConditionalGeneration):
    """LLaVA-1.5, pruned."""

    @override
    def eadaprune_encode(self, modality: str, **kwargs: Any) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
        if "pixel_values" not in kwargs:  # a client's embeddings
            return super().eadaprune_encode(modality, **kwargs)
        features = self._process_image_pixels(self._parse_and_validate_image_input(**kwargs))
        return list(self.multi_modal_projector(features)), list(features)

    @override
    @classmethod
    def eadaprune_layout(cls, config: Any, modality: str, data: Mapping[str, Any], num_placeholders: int) -> Layout:
        side = int(config.vision_config.image_size // config.vision_config.patch_size)
        is_grid = "pixel_values" in data and num_placeholders == side**2
        return Layout.whole(side, side) if is_grid else Layout.whole(1, num_placeholders)

    @override
    def eadaprune_token_scores(self, modality: str, data: Mapping[str, Any], attention: torch.Tensor) -> torch.Tensor:
        return self.eadaprune_patch_attention(attention, tiles=1)[0]
