"""Mistral's models: in Hugging Face's format (Mistral 3), and in Mistral's own (Pixtral, Mistral Small 3.1 and later).

For the latter, Mistral's library writes all tokens of each image into the prompt before vLLM sees it.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from typing_extensions import override
from vllm.model_executor.models import mistral3, pixtral
from vllm.multimodal import MULTIMODAL_REGISTRY

from eadaprune_vllm.core.layout import Layout
from eadaprune_vllm.engine.model import Pruned, pool_attention
from eadaprune_vllm.frontend.pending import PendingItem
from eadaprune_vllm.frontend.processor import PruningProcessor


class PixtralTower(Pruned):
    """Mixin for Mistral's models. Their tower has patches line by line, and squares of them are merged into tokens.

    Attributes:
        eadaprune_pixels: name of the field with the pixels of an image.
    """

    eadaprune_modalities: ClassVar[tuple[str, ...]] = ("image",)
    eadaprune_takes_embeddings: ClassVar[bool] = False  # these come without a grid
    eadaprune_pixels: ClassVar[str]

    @classmethod
    def eadaprune_merge_size(cls, config: Any) -> int:
        """The side of these squares, in patches."""
        return int(config.spatial_merge_size)

    @override
    @classmethod
    def eadaprune_layout(cls, config: Any, modality: str, data: Mapping[str, Any], num_placeholders: int) -> Layout:
        token = config.vision_config.patch_size * cls.eadaprune_merge_size(config)
        _, height, width = data[cls.eadaprune_pixels].shape
        return Layout.whole(height // token, width // token)

    @override
    def eadaprune_token_scores(self, modality: str, data: Mapping[str, Any], attention: torch.Tensor) -> torch.Tensor:
        ((rows, columns),) = self.eadaprune_layout(self.config, modality, data, 0).grids
        return pool_attention(attention, rows, columns, self.eadaprune_merge_size(self.config))


class PrunedMistral3Processor(PruningProcessor, mistral3.Mistral3MultiModalProcessor):
    """Mistral 3's processor, pruning."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedMistral3Processor, info=mistral3.Mistral3ProcessingInfo, dummy_inputs=mistral3.Mistral3DummyInputsBuilder
)
class PrunedMistral3ForConditionalGeneration(PixtralTower, mistral3.Mistral3ForConditionalGeneration):
    """Mistral 3, pruned."""

    eadaprune_pixels: ClassVar[str] = "pixel_values"


class PrunedPixtralProcessor(PruningProcessor, pixtral.PixtralMultiModalProcessor):
    """Pixtral's processor, pruning.

    Modifications:
    - the tokens of an image in the prompt are replaced by those that are kept
    """

    @override
    def eadaprune_replaced_tokens(self, new: PendingItem) -> int:
        return new.request.num_placeholders

    @override
    def _maybe_apply_prompt_updates(self, mm_items: Any, mm_res: Any) -> Any:
        processor = self.info.get_hf_processor()
        pruned, rest = [], list(mm_res.prompt_ids)
        for (update,) in mm_res.prompt_updates.get("image", ()):
            if processor.image_token_id not in rest:
                break  # vLLM raises the error
            start = rest.index(processor.image_token_id)
            end = rest.index(processor.image_end_id, start)  # a truncated prompt may begin with another image's end
            pruned += [*rest[:start], *update.content.full]
            rest = rest[end + 1 :]
        return super()._maybe_apply_prompt_updates(mm_items, mm_res._replace(prompt_ids=pruned + rest))


@MULTIMODAL_REGISTRY.register_processor(
    PrunedPixtralProcessor, info=pixtral.PixtralProcessingInfo, dummy_inputs=pixtral.PixtralDummyInputsBuilder
)
class PrunedPixtralForConditionalGeneration(PixtralTower, pixtral.PixtralForConditionalGeneration):
    """Pixtral, pruned."""

    eadaprune_pixels: ClassVar[str] = "images"

    @override
    @classmethod
    def eadaprune_merge_size(cls, config: Any) -> int:
        return int(getattr(config.vision_config, "spatial_merge_size", 1))
