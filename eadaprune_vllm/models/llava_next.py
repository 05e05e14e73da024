"""LLaVA-NeXT (LLaVA-1.5's tower over tiles of the image, per-token projector).

Unlike research code that prunes this model, which drops the removal of padding and the newlines, the layout is the
model's own: pruning takes tokens out of the sequence that stock vLLM makes, and a newline stays while its line keeps
any token.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape
from typing_extensions import override
from vllm.config import VllmConfig
from vllm.model_executor.models import llava_next
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.multimodal import MULTIMODAL_REGISTRY

from eadaprune_vllm.encoder import LlavaVisionEncoder
from eadaprune_vllm.errors import StartupError
from eadaprune_vllm.models.base import PruningProcessor
from eadaprune_vllm.models.fields import NEWLINES
from eadaprune_vllm.models.towerless import MaxTokens, Towerless, instead, nothing, without
from eadaprune_vllm.prune import Encoding, Newlines
from eadaprune_vllm.selectors import VisualTokens


class LlavaNextVisionEncoder(LlavaVisionEncoder):
    """LLaVA-1.5's, over the whole image and, if there are any, its tiles.

    vLLM's own function arranges them: it is given NaN for the newline, so that newlines can be told from tokens.
    """

    takes_embeddings = False
    newline_is_argument = False  # of vLLM's function, which finds it on the model otherwise
    model: Any = llava_next.LlavaNextForConditionalGeneration

    def __init__(self, hf_config: Any) -> None:
        super().__init__(hf_config)
        if self.has_cls and not self.first:
            raise StartupError("vision_feature_select_strategy='full' is not supported for this model")

    @property
    def newline(self) -> torch.Tensor | None:
        """What the engine is sent of a newline, if it does not write it itself."""
        return None

    def arrange(self, embeddings: torch.Tensor, image_size: torch.Tensor) -> torch.Tensor:
        """Args:
            embeddings: ``[T, N, C]``.
            image_size: height and width of the image.

        Returns:
            ``[placeholders, C]``, in the order of the prompt, NaN for newlines.
        """
        newline = embeddings.new_full(embeddings.shape[-1:], torch.nan)
        model = SimpleNamespace(config=self.hf_config, image_newline=newline)
        argument = {"image_newline": newline} if self.newline_is_argument else {}
        arranged: torch.Tensor = self.model._merge_image_patch_embeddings(
            model, image_size, embeddings, strategy="spatial_unpad", **argument
        )
        return arranged

    def tiled(self, features: torch.Tensor, attention: torch.Tensor, image_size: torch.Tensor) -> Encoding:
        """The encoding of an image from its tiles, the first of which is the whole image.

        Args:
            features: ``[T, N, C]``.
            attention: ``[T, N]``.
            image_size: height and width of the image.
        """
        side, height, width = self.side, 0, 1
        if len(features) > 1:
            vision = self.hf_config.vision_config
            height, width = get_anyres_image_grid_shape(
                image_size.tolist(), self.hf_config.image_grid_pinpoints, vision.image_size
            )
        # Row and column apart, so that interpolation between tiles does not make up a third one.
        place = [(-1.0, -1.0), *((float(row), float(column)) for row in range(height) for column in range(width))]
        known = torch.cat((torch.tensor(place)[:, None].expand(-1, side**2, -1), attention[..., None]), -1)
        rows, columns, attention = self.arrange(known, image_size).unbind(-1)
        mask = rows.isnan()
        part = (rows.round() * width + columns.round())[~mask].long()
        line = mask.cumsum(0)[~mask]
        grids = [(side, side)]
        if len(features) > 1:
            line[: side**2] = -1
            # Of a very thin image nothing but its padding may be left.
            if unpadded := len(line) - side**2:
                lines = int(mask.sum())
                grids.append((lines, unpadded // lines))
        tokens = VisualTokens(self.arrange(features, image_size)[~mask], attention[~mask])
        return Encoding(tokens, part, tuple(grids), newlines=Newlines(mask, line, self.newline))

    @torch.inference_mode()
    def encode(self, inputs: Mapping[str, Any]) -> Encoding:
        return self.tiled(*self.tower(inputs["pixel_values"][0]), inputs["image_sizes"][0])


class PrunedLlavaNextProcessingInfo(MaxTokens, llava_next.LlavaNextProcessingInfo):
    """LLaVA-NeXT's."""


class PrunedLlavaNextProcessor(PruningProcessor, llava_next.LlavaNextMultiModalProcessor):
    """LLaVA-NeXT's processor, pruning."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedLlavaNextProcessor, info=PrunedLlavaNextProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class PrunedLlavaNextForConditionalGeneration(Towerless, llava_next.LlavaNextForConditionalGeneration):
    """Modifications:
    - has no vision tower and skips its weights
    - puts newlines where the processor says
    """

    encoder = LlavaNextVisionEncoder
    supports_tower_connector_lora = False
    supports_mm_device_do_normalize = False
    hf_to_vllm_mapper = without(llava_next.LlavaNextForConditionalGeneration, "vision_tower.")

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        with instead(llava_next, init_vision_tower_for_llava=nothing):
            super().__init__(vllm_config=vllm_config, prefix=prefix)

    @override
    def embed_multimodal(self, **kwargs: Any) -> list[torch.Tensor]:
        return [
            torch.where(newlines[:, None], self.image_newline, tokens)
            for tokens, newlines in zip(
                super().embed_multimodal(**kwargs), kwargs.get(f"image{NEWLINES}", ()), strict=True
            )
        ]
