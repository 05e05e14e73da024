"""What pruning makes, without load, of images and videos that are not part of a prompt: for the preview endpoint, and
for the commands that look at images without a server."""

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from eadaprune_vllm import draw
from eadaprune_vllm.models.base import PruningProcessor
from eadaprune_vllm.models.items import refused_features, report_of
from eadaprune_vllm.options import PruneOptions
from eadaprune_vllm.prune import Encoding, Kept
from eadaprune_vllm.report import ItemPreview, Pruning
from eadaprune_vllm.request import Choices
from eadaprune_vllm.spectrum import Spectrum


@dataclass(frozen=True)
class Examined:
    """One image or video, the decision about it, and what that rests on.

    Attributes:
        view: what the grid of a number lies over.
    """

    view: Callable[[int], Image.Image]
    options: PruneOptions
    kept: Kept
    encoding: Encoding

    @property
    def spectrum(self) -> Spectrum:
        return self.encoding.spectrum(self.options.scope)

    def overlay(self) -> Image.Image:
        """What is looked at, with its pruned patches dark and grey."""
        return draw.dim_pruned(self.view, self.kept.indices.tolist(), self.encoding.grids)

    def preview(self, overlay: bool = False) -> ItemPreview:
        """What the endpoint says of it, drawn or not."""
        report = report_of(self.kept, self.options).model_dump()
        drawn = draw.data_url(self.overlay()) if overlay else None
        return ItemPreview(**report, curve=self.spectrum.curve(), overlay=drawn)


def examine(processor: PruningProcessor, mm_items: Any, modality: str, index: int, options: PruneOptions) -> Examined:
    """Args:
        processor: of a front end.
        mm_items: as the processor parses them.
        modality: ``image`` or ``video``.
        index: which of that modality.
        options: resolved options.

    Raises:
        VLLMServerError: if the features are not finite.
    """
    assert processor.front_end
    source, _ = processor.source(mm_items, modality, index, {})
    with refused_features(source):
        kept, encoding = processor.front_end.preview(source, options)
    view = functools.partial(processor.view, mm_items[modality].get(index), len(encoding.grids))
    return Examined(view, options, kept, encoding)


def preview_items(processor: PruningProcessor, items: Mapping[str, Any], choices: Choices, overlay: bool) -> Pruning:
    """Args:
        processor: of a front end.
        items: as vLLM fetches them, by modality.
        choices: for each.
        overlay: whether to draw what is kept.

    Raises:
        VLLMServerError: if the features of one are not finite.
    """
    assert processor.front_end
    start = time.perf_counter()
    mm_items = processor.info.parse_mm_data(items)
    previews: dict[str, list[ItemPreview]] = defaultdict(list)
    for modality, of_each in choices.items():
        for index, choice in enumerate(of_each):
            examined = examine(processor, mm_items, modality, index, choice.options)
            previews[modality].append(examined.preview(overlay))
    return Pruning(previews, time.perf_counter() - start, processor.front_end.kv_bytes_per_token)
