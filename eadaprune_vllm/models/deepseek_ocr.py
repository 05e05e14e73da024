"""DeepSeek-OCR (SAM's tower and CLIP's one after the other, over the tiles of a page and the whole of it)."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from typing_extensions import override
from vllm.model_executor.models import deepseek_ocr
from vllm.multimodal import MULTIMODAL_REGISTRY

from eadaprune_vllm.core.layout import Layout, Newlines
from eadaprune_vllm.engine.model import Pruned
from eadaprune_vllm.frontend.processor import PruningProcessor

_TOKEN = 64  # side of a token, in pixels


class PrunedDeepseekOCRProcessor(PruningProcessor, deepseek_ocr.DeepseekOCRMultiModalProcessor):
    """DeepSeek-OCR's processor, pruning."""


@MULTIMODAL_REGISTRY.register_processor(
    PrunedDeepseekOCRProcessor,
    info=deepseek_ocr.DeepseekOCRProcessingInfo,
    dummy_inputs=deepseek_ocr.DeepseekOCRDummyInputsBuilder,
)
class PrunedDeepseekOCRForCausalLM(Pruned, deepseek_ocr.DeepseekOCRForCausalLM):
    """DeepSeek-OCR, pruned only if the operator or a request sets a threshold."""

    eadaprune_modalities: ClassVar[tuple[str, ...]] = ("image",)
    eadaprune_takes_embeddings = False  # vLLM's model takes pixels only
    eadaprune_captures_attention: ClassVar[bool] = False  # tiles and the whole page are encoded apart
    eadaprune_energy: ClassVar[float | None] = 1.0  # pages of text have the lowest rank, and would lose most

    @override
    @classmethod
    def eadaprune_layout(cls, config: Any, modality: str, data: Mapping[str, Any], num_placeholders: int) -> Layout:
        """Tiles as one picture, then the whole page; each line ends with a newline, and all end with a separator."""
        columns, rows = data["images_spatial_crop"].tolist()
        sides = [(data["images_crop"].shape[-1], rows, columns)] * (rows * columns > 1)
        sides.append((data["pixel_values"].shape[-1], 1, 1))
        grids = tuple((down * side // _TOKEN, across * side // _TOKEN) for side, down, across in sides)
        part = torch.cat([torch.full((height * width,), n) for n, (height, width) in enumerate(grids)])
        widths = torch.tensor([width for height, width in grids for _ in range(height)])
        mask = torch.zeros(len(part) + len(widths) + 1, dtype=torch.bool)
        mask[(widths + 1).cumsum(0) - 1] = mask[-1] = True
        return Layout(part, grids, Newlines(mask, torch.arange(len(widths)).repeat_interleave(widths)))
