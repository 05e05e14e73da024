"""What pruning makes, without load, of images and videos that are not part of a prompt: for the preview endpoint, and
for the commands that look at images without a server."""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.processing.inputs import ProcessorInputs

from eadaprune_vllm.core import draw
from eadaprune_vllm.core.options import PruneOptions
from eadaprune_vllm.core.report import ItemPreview, Pruning
from eadaprune_vllm.frontend.items import Item, to_client
from eadaprune_vllm.frontend.limits import check_length
from eadaprune_vllm.frontend.pending import PendingItem
from eadaprune_vllm.frontend.processor import PruningProcessor
from eadaprune_vllm.frontend.request_options import Choices
from eadaprune_vllm.messages import Explanation

# Of one request, with an overlay or the whole spectrum of each. An item takes a few bytes of a request if its URL was
# there before, and up to a megabyte of the answer.
MAX_DETAILED = 8


@dataclass(frozen=True, eq=False)
class PreviewItem:
    """One image or video, and what is asked about it.

    Attributes:
        modality: to the client.
        view: what the grid of a number lies over, of so many.
        fewest: how many placeholders it keeps at least.
    """

    modality: str
    view: Callable[[int, int], Image.Image]
    options: PruneOptions
    pending: PendingItem
    fewest: int

    @property
    def explanation(self) -> Explanation:
        """What the answer rests on.

        Raises:
            VLLMServerError, VLLMValidationError: if nothing could be decided.
        """
        explanation = self.pending.decided().explanation
        assert explanation, "they were asked for"
        return explanation

    def overlay(self) -> Image.Image:
        """The image or video, with its pruned patches dark and grey."""
        grids, kept = self.explanation.grids, self.pending.decided().kept
        return draw.dim_pruned(functools.partial(self.view, len(grids)), kept.indices.tolist(), grids)

    def preview(self, overlay: bool, spectrum: bool) -> ItemPreview:
        """What the endpoint says of it, with or without a drawing and the whole spectrum."""
        content = self.pending.update.content.pruned(self.pending.decided().kept)
        report = content.report(Item(self.modality, "", "", self.options, self.options.threshold)).model_dump()
        return ItemPreview(
            **report,
            curve=self.explanation.curve,
            spectrum=[round(value, 9) for value in self.explanation.thresholds.tolist()] if spectrum else None,
            overlay=draw.data_url(self.overlay(), "jpeg") if overlay else None,
        )


def check_detailed(choices: Choices, **asked: bool) -> None:
    """Args:
        choices: for each image and video of a request.
        asked: whether a field is set that is answered at length for each.

    Raises:
        VLLMValidationError: if it is, and there are too many.
    """
    count = sum(map(len, choices.values()))
    for name in (name for name, is_set in asked.items() if is_set and count > MAX_DETAILED):
        raise VLLMValidationError(
            f"{name} is for previews of at most {MAX_DETAILED} images and videos, and this one has {count}: "
            f"leave {name} out, or send fewer",
            parameter=name,
            value=count,
        )


def iter_preview_items(
    processor: PruningProcessor, items: Mapping[str, Any], choices: Choices
) -> Iterator[PreviewItem]:
    """Reads one after the other, as it is asked for the next: others may have their turn on the thread meanwhile. Those
    that are equal, under equal options, are the same object, read once.

    Args:
        processor: of a front end.
        items: as vLLM fetches them, by its modality.
        choices: for each.

    Raises:
        VLLMValidationError: if no prompt with all of them can ever fit.
    """
    inputs, fewest = ProcessorInputs([], processor.info.parse_mm_data(items)), 0
    hashes, known = processor._get_mm_hashes(inputs), dict[tuple[str, str, PruneOptions], PreviewItem]()
    for modality, names in to_client(inputs.mm_data_items).items():
        for index, (name, choice) in enumerate(zip(names, choices.along(names), strict=True)):
            options, key = choice.options, (name, hashes[modality][index], choice.options)
            if key not in known:
                new = processor.read(inputs, modality, index, options)
                view = functools.partial(processor.view, inputs.mm_data_items[modality].get(index))
                known[key] = PreviewItem(name, view, options, new, new.min_placeholders(options))
                new.needs_decision = new.request.explain = True
            fewest += known[key].fewest
            check_length(processor.info.ctx.model_config, fewest)
            yield known[key]


def previews(processor: PruningProcessor, items: Sequence[PreviewItem], overlay: bool, spectrum: bool) -> Pruning:
    """Args:
        processor: of a front end.
        items: what was asked, and answered.
        overlay: whether to draw what is kept.
        spectrum: whether to tell the whole spectrum.

    Raises:
        VLLMServerError: if the features of one are not finite.
    """
    assert processor.front_end
    found = {item: item.preview(overlay, spectrum) for item in dict.fromkeys(items)}
    of: dict[str, list[ItemPreview]] = defaultdict(list)
    for item in items:
        of[item.modality].append(found[item])
    seconds = sum(sum(item.pending.decided().seconds.values()) for item in found)
    return Pruning(of, seconds, processor.front_end.kv_bytes_per_token)
