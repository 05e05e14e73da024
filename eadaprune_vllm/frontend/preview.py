"""Decisions about images and videos that are not part of a prompt, without load: for the preview endpoint, and for the
commands that start an engine of their own."""

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
from eadaprune_vllm.frontend.items import Item, client_modalities
from eadaprune_vllm.frontend.limits import check_length
from eadaprune_vllm.frontend.pending import PendingItem
from eadaprune_vllm.frontend.processor import PruningProcessor
from eadaprune_vllm.frontend.request_options import Choices
from eadaprune_vllm.messages import Explanation

# Images and videos of one preview with overlays or whole spectra. A repeated URL takes a few bytes of the request, and
# up to a megabyte of the response.
MAX_DETAILED = 8


@dataclass(frozen=True, eq=False)
class PreviewItem:
    """One image or video of a preview.

    Attributes:
        modality: the client's.
        background: the picture under a grid, by the number of grids and the grid's number.
        options: effective.
        pending: the item that gets the decision.
        min_placeholders: lower bound of the placeholders that it keeps.
    """

    modality: str
    background: Callable[[int, int], Image.Image]
    options: PruneOptions
    pending: PendingItem
    min_placeholders: int

    @property
    def explanation(self) -> Explanation:
        """Why the decision is as it is.

        Raises:
            VLLMServerError, VLLMValidationError: if the decision failed.
        """
        explanation = self.pending.decided().explanation
        assert explanation, "it was requested"
        return explanation

    def overlay(self) -> Image.Image:
        """The image or video, with its pruned patches dark and grey."""
        grids, decision = self.explanation.grids, self.pending.decided().decision
        return draw.dim_pruned(functools.partial(self.background, len(grids)), decision.indices.tolist(), grids)

    def preview(self, overlay: bool, spectrum: bool) -> ItemPreview:
        """The endpoint's report, with overlay and whole spectrum if wanted."""
        content = self.pending.update.content.pruned(self.pending.decided().decision)
        report = content.report(Item(self.modality, "", "", self.options, self.options.threshold)).model_dump()
        return ItemPreview(
            **report,
            curve=self.explanation.curve,
            spectrum=[round(value, 9) for value in self.explanation.thresholds.tolist()] if spectrum else None,
            overlay=draw.data_url(self.overlay(), "jpeg") if overlay else None,
        )


def check_detailed(choices: Choices, **fields: bool) -> None:
    """Check the size of the response.

    Args:
        choices: of each image and video of a preview.
        fields: by name, whether a field is set that makes the response long.

    Raises:
        VLLMValidationError: if one is set, and there are too many images and videos.
    """
    count = sum(map(len, choices.values()))
    for name in (name for name, is_set in fields.items() if is_set and count > MAX_DETAILED):
        raise VLLMValidationError(
            f"{name} is for previews of at most {MAX_DETAILED} images and videos, and this one has {count}: "
            f"leave {name} out, or send fewer",
            parameter=name,
            value=count,
        )


def iter_preview_items(
    processor: PruningProcessor, items: Mapping[str, Any], choices: Choices
) -> Iterator[PreviewItem]:
    """Process the items one by one; between two of them other requests may use the thread. Equal items with equal
    options are the same object, processed once.

    Args:
        processor: of a front end.
        items: as vLLM fetches them, by its modality.
        choices: of each item.

    Raises:
        VLLMValidationError: if a prompt with all items is too long for the model.
    """
    inputs, min_length = ProcessorInputs([], processor.info.parse_mm_data(items)), 0
    hashes, known = processor._get_mm_hashes(inputs), dict[tuple[str, str, PruneOptions], PreviewItem]()
    for modality, names in client_modalities(inputs.mm_data_items).items():
        for index, (name, choice) in enumerate(zip(names, choices.for_items(names), strict=True)):
            options, key = choice.options, (name, hashes[modality][index], choice.options)
            if key not in known:
                new = processor.read(inputs, modality, index, options)
                background = functools.partial(
                    processor.eadaprune_background, inputs.mm_data_items[modality].get(index)
                )
                known[key] = PreviewItem(name, background, options, new, new.min_placeholders(options))
                new.needs_decision = new.request.explain = True
            min_length += known[key].min_placeholders
            check_length(processor.info.ctx.model_config, min_length)
            yield known[key]


def previews(processor: PruningProcessor, items: Sequence[PreviewItem], overlay: bool, spectrum: bool) -> Pruning:
    """The reports of decided items.

    Args:
        processor: of a front end.
        items: with responses.
        overlay: whether to draw the kept patches.
        spectrum: whether to include the whole spectrum.

    Raises:
        VLLMServerError, VLLMValidationError: if a decision failed.
    """
    assert processor.front_end
    found = {item: item.preview(overlay, spectrum) for item in dict.fromkeys(items)}
    by_modality: dict[str, list[ItemPreview]] = defaultdict(list)
    for item in items:
        by_modality[item.modality].append(found[item])
    seconds = sum(sum(item.pending.decided().seconds.values()) for item in found)
    return Pruning(by_modality, seconds, processor.front_end.kv_bytes_per_token)
