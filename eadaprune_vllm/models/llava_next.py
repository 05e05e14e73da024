"""LLaVA-NeXT (LLaVA-1.5's tower over tiles of the image, per-token projector).

Tokens are pruned from the sequence that stock vLLM makes: padding is removed, and a newline is kept if its line keeps a
token. (Research code for this model keeps padding and has no newlines.)
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape
from typing_extensions import override
from vllm.model_executor.models import llava_next
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.multimodal import MULTIMODAL_REGISTRY

from eadaprune_vllm.core.layout import Layout, Newlines
from eadaprune_vllm.frontend.processor import PruningProcessor
from eadaprune_vllm.models.llava import LlavaTower


class Tiled(LlavaTower):
    """Mixin for models that encode an image as a whole and in tiles.

    vLLM's own function arranges the tokens. It gets NaN for the newline, so that newlines can be told from tokens.
    """

    eadaprune_takes_embeddings = False  # without pixels it is not known where lines end
    newline_is_argument: ClassVar[bool] = False  # whether vLLM's function takes the newline as an argument

    @classmethod
    def arranged(cls, config: Any, tiles: torch.Tensor, image_size: torch.Tensor) -> torch.Tensor:
        """The tokens of tiles in the order of the prompt, with newlines.

        Args:
            config: of the model.
            tiles: ``[T, N, C]``.
            image_size: height and width of the image.

        Returns:
            ``[placeholders, C]``, in the order of the prompt, NaN for newlines.
        """
        newline = tiles.new_full(tiles.shape[-1:], torch.nan)
        argument = {"image_newline": newline} if cls.newline_is_argument else {}
        merged: torch.Tensor = cls._merge_image_patch_embeddings(
            SimpleNamespace(config=config, image_newline=newline),
            image_size,
            tiles,
            strategy="spatial_unpad",
            **argument,
        )
        return merged

    @override
    @classmethod
    def eadaprune_layout(cls, config: Any, modality: str, data: Mapping[str, Any], num_placeholders: int) -> Layout:
        vision, image_size, tiles = config.vision_config, data["image_sizes"], len(data["pixel_values"])
        side, height, width = vision.image_size // vision.patch_size, 0, 1
        if tiles > 1:
            height, width = get_anyres_image_grid_shape(
                image_size.tolist(), config.image_grid_pinpoints, vision.image_size
            )
        # Row and column are separate channels, so that interpolation between tiles makes no number of another tile. The
        # image may have padding tiles of its batch.
        place = torch.tensor([(-1.0, -1.0), *((r, c) for r in range(height) for c in range(width))])
        places = place[:tiles, None].expand(-1, side**2, -1)
        rows, columns = cls.arranged(config, places, image_size).unbind(-1)
        mask = rows.isnan()
        part = (rows.round() * width + columns.round())[~mask].long()
        line = mask.cumsum(0)[~mask]
        grids = [(side, side)]
        if tiles > 1:
            line[: side**2] = -1
            # Of a very thin image there may be no tokens but padding.
            if unpadded := len(line) - side**2:
                lines = int(mask.sum())
                grids.append((lines, unpadded // lines))
        return Layout(part, tuple(grids), Newlines(mask, line))

    @override
    def eadaprune_token_scores(self, modality: str, data: Mapping[str, Any], attention: torch.Tensor) -> torch.Tensor:
        tiles = self.eadaprune_patch_attention(attention, len(data["pixel_values"]))
        merged = self.arranged(self.config, tiles[..., None], data["image_sizes"])[:, 0]
        return merged[~merged.isnan()]


class PrunedLlavaNextProcessor(PruningProcessor, llava_next.LlavaNextMultiModalProcessor):
    """LLaVA-NeXT's processor, pruning."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedLlavaNextProcessor, info=llava_next.LlavaNextProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class PrunedLlavaNextForConditionalGeneration(Tiled, llava_next.LlavaNextForConditionalGeneration):
    """LLaVA-NeXT, pruned."""

    @override
    def eadaprune_encode(self, modality: str, **kwargs: Any) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
        tiles = [*kwargs["pixel_values"]]
        counts = [len(image) for image in tiles]
        features = self._image_pixels_to_features(self.vision_tower, torch.cat(tiles))
        projected = self.multi_modal_projector(features).split(counts)
        sizes = kwargs["image_sizes"]
        embeds = [
            self._merge_image_patch_embeddings(size, image, strategy="spatial_unpad")
            for size, image in zip(sizes, projected, strict=True)
        ]
        arranged = [
            self.arranged(self.config, image, size) for size, image in zip(sizes, features.split(counts), strict=True)
        ]
        return embeds, [merged[~merged[:, 0].isnan()] for merged in arranged]
