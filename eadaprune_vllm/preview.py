"""What pruning makes, without load, of images and videos that are not part of a prompt: for the preview endpoint, and
for the commands that look at images without a server."""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image
from vllm.multimodal.processing.inputs import ProcessorInputs

from eadaprune_vllm import draw
from eadaprune_vllm.models.base import PruningProcessor
from eadaprune_vllm.models.items import Item, New, to_client
from eadaprune_vllm.options import PruneOptions
from eadaprune_vllm.report import ItemPreview, Pruning
from eadaprune_vllm.request import Choices
from eadaprune_vllm.wire import Grounds


@dataclass(frozen=True)
class LookedAt:
    """One image or video, and what is asked about it.

    Attributes:
        modality: to the client.
        view: what the grid of a number lies over, of so many.
    """

    modality: str
    view: Callable[[int, int], Image.Image]
    options: PruneOptions
    new: New

    @property
    def grounds(self) -> Grounds:
        """What the answer rests on.

        Raises:
            VLLMServerError, VLLMValidationError: if nothing could be decided.
        """
        grounds = self.new.decided().grounds
        assert grounds, "they were asked for"
        return grounds

    def overlay(self) -> Image.Image:
        """What is looked at, with its pruned patches dark and grey."""
        grids, kept = self.grounds.grids, self.new.decided().kept
        return draw.dim_pruned(functools.partial(self.view, len(grids)), kept.indices.tolist(), grids)

    def preview(self, overlay: bool, spectrum: bool) -> ItemPreview:
        """What the endpoint says of it, with or without a drawing and the whole spectrum."""
        content = self.new.update.content.pruned(self.new.decided().kept)
        report = content.report(Item(self.modality, "", "", self.options, self.options.threshold)).model_dump()
        return ItemPreview(
            **report,
            curve=self.grounds.curve,
            spectrum=[round(value, 9) for value in self.grounds.needed_above.tolist()] if spectrum else None,
            overlay=draw.data_url(self.overlay()) if overlay else None,
        )


def look_at(processor: PruningProcessor, items: Mapping[str, Any], choices: Choices) -> Iterator[LookedAt]:
    """Reads one after the other, as it is asked for the next: others may have their turn on the thread meanwhile.

    Args:
        processor: of a front end.
        items: as vLLM fetches them, by its modality.
        choices: for each.

    Raises:
        VLLMValidationError: if no prompt with all of them can ever fit.
    """
    inputs, fewest = ProcessorInputs([], processor.info.parse_mm_data(items)), 0
    for modality, names in to_client(inputs.mm_data_items).items():
        for index, (name, choice) in enumerate(zip(names, choices.along(names), strict=True)):
            new = processor.read(inputs, modality, index, choice.options)
            fewest += new.fewest(choice.options)
            processor.check_length(fewest)
            new.asks = new.question.explain = True
            view = functools.partial(processor.view, inputs.mm_data_items[modality].get(index))
            yield LookedAt(name, view, choice.options, new)


def previews(processor: PruningProcessor, looked_at: Iterable[LookedAt], overlay: bool, spectrum: bool) -> Pruning:
    """Args:
        processor: of a front end.
        looked_at: what was asked, and answered.
        overlay: whether to draw what is kept.
        spectrum: whether to tell the whole spectrum.

    Raises:
        VLLMServerError: if the features of one are not finite.
    """
    assert processor.front_end
    of: dict[str, list[ItemPreview]] = defaultdict(list)
    seconds = 0.0
    for each in looked_at:
        of[each.modality].append(each.preview(overlay, spectrum))
        seconds += sum(each.new.decided().seconds.values())
    return Pruning(of, seconds, processor.front_end.kv_bytes_per_token)
