"""Mistral's models in Mistral's own format (Pixtral, Mistral Small 3.1 and later), whose library writes all tokens of
each image into the prompt before vLLM sees it."""

from collections.abc import Mapping
from typing import Any, ClassVar

from typing_extensions import override
from vllm.model_executor.models import pixtral
from vllm.multimodal import MULTIMODAL_REGISTRY

from eadaprune_vllm.models.base import PruningProcessor
from eadaprune_vllm.models.items import New
from eadaprune_vllm.models.pruned import Pruned
from eadaprune_vllm.prune import Layout


class PrunedPixtralProcessor(PruningProcessor, pixtral.PixtralMultiModalProcessor):
    """Pixtral's processor, pruning.

    Modifications:
    - of an image's tokens in the prompt, only those that are left stay there
    """

    @override
    def eadaprune_in_prompt(self, new: New) -> int:
        return new.question.num_placeholders

    @override
    def _maybe_apply_prompt_updates(self, mm_items: Any, mm_res: Any) -> Any:
        processor = self.info.get_hf_processor()
        left, rest = [], list(mm_res.prompt_ids)
        for (update,) in mm_res.prompt_updates.get("image", ()):
            if processor.image_token_id not in rest:
                break  # what is missing vLLM will say
            start, end = rest.index(processor.image_token_id), rest.index(processor.image_end_id)
            left += [*rest[:start], *update.content.full]
            rest = rest[end + 1 :]
        return super()._maybe_apply_prompt_updates(mm_items, mm_res._replace(prompt_ids=left + rest))


@MULTIMODAL_REGISTRY.register_processor(
    PrunedPixtralProcessor, info=pixtral.PixtralProcessingInfo, dummy_inputs=pixtral.PixtralDummyInputsBuilder
)
class PrunedPixtralForConditionalGeneration(Pruned, pixtral.PixtralForConditionalGeneration):
    """Pixtral, pruned."""

    eadaprune_modalities: ClassVar[tuple[str, ...]] = ("image",)
    eadaprune_observes: ClassVar[bool] = False
    eadaprune_takes_embeddings: ClassVar[bool] = False

    @override
    @classmethod
    def eadaprune_layout(cls, config: Any, modality: str, data: Mapping[str, Any], num_placeholders: int) -> Layout:
        _, height, width = data["images"].shape
        token = config.vision_config.patch_size * getattr(config.vision_config, "spatial_merge_size", 1)
        return Layout.whole(height // token, width // token)
