"""LLaVA-NeXT (LLaVA-1.5's tower over tiles of the image, per-token projector).

Unlike research code that prunes this model, which drops the removal of padding and the newlines, the layout is the
model's own: pruning takes tokens out of the sequence that stock vLLM makes, and a newline stays while its line keeps
any token.
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

from eadaprune_vllm.core.prune import Layout, Newlines
from eadaprune_vllm.frontend.processor import PruningProcessor
from eadaprune_vllm.models.llava import LlavaTower


class Tiled(LlavaTower):
    """Mixin for models that see an image whole and, if there are any, in tiles.

    vLLM's own function arranges them: it is given NaN for the newline, so that newlines can be told from tokens.
    """

    eadaprune_takes_embeddings = False  # they do not say where lines of the picture end
    newline_is_argument: ClassVar[bool] = False  # of vLLM's function, which finds it on the model otherwise

    @classmethod
    def arranged(cls, config: Any, of_tiles: torch.Tensor, image_size: torch.Tensor) -> torch.Tensor:
        """Args:
            config: of the model.
            of_tiles: ``[T, N, C]``.
            image_size: height and width of the image.

        Returns:
            ``[placeholders, C]``, in the order of the prompt, NaN for newlines.
        """
        newline = of_tiles.new_full(of_tiles.shape[-1:], torch.nan)
        argument = {"image_newline": newline} if cls.newline_is_argument else {}
        merged: torch.Tensor = cls._merge_image_patch_embeddings(
            SimpleNamespace(config=config, image_newline=newline),
            image_size,
            of_tiles,
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
        # Row and column apart, so that interpolation between tiles does not make up a third one. A batch may have
        # been padded with more tiles.
        place = torch.tensor([(-1.0, -1.0), *((r, c) for r in range(height) for c in range(width))])
        places = place[:tiles, None].expand(-1, side**2, -1)
        rows, columns = cls.arranged(config, places, image_size).unbind(-1)
        mask = rows.isnan()
        part = (rows.round() * width + columns.round())[~mask].long()
        line = mask.cumsum(0)[~mask]
        grids = [(side, side)]
        if tiles > 1:
            line[: side**2] = -1
            # Of a very thin image nothing but its padding may be left.
            if unpadded := len(line) - side**2:
                lines = int(mask.sum())
                grids.append((lines, unpadded // lines))
        return Layout(part, tuple(grids), Newlines(mask, line))

    @override
    def eadaprune_token_scores(self, modality: str, data: Mapping[str, Any], attention: torch.Tensor) -> torch.Tensor:
        tiles = self.eadaprune_patches(attention, len(data["pixel_values"]))
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
        counts = [len(of_image) for of_image in tiles]
        features = self._image_pixels_to_features(self.vision_tower, torch.cat(tiles))
        projected = self.multi_modal_projector(features).split(counts)
        sizes = kwargs["image_sizes"]
        rows = [
            self._merge_image_patch_embeddings(size, of_image, strategy="spatial_unpad")
            for size, of_image in zip(sizes, projected, strict=True)
        ]
        arranged = [
            self.arranged(self.config, of_image, size)
            for size, of_image in zip(sizes, features.split(counts), strict=True)
        ]
        return rows, [merged[~merged[:, 0].isnan()] for merged in arranged]
