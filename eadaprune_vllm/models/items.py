"""One request's images and videos on their way through the processor."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import BatchFeature
from vllm.exceptions import VLLMServerError, VLLMValidationError
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import EmbeddingItems
from vllm.multimodal.processing import PromptUpdateDetails

from eadaprune_vllm.errors import NonFiniteFeaturesError
from eadaprune_vllm.options import KEY, PruneOptions
from eadaprune_vllm.prune import Encoding, Kept
from eadaprune_vllm.report import ItemReport, Timing


@dataclass
class PrunedDetails(PromptUpdateDetails):
    """Placeholders of one item, with what a cache hit repeats.

    Attributes:
        report: of the item.
        skipped: by how much positions may run ahead of tokens because of it.
        digest: of the kept tokens.
    """

    report: ItemReport | None = None
    skipped: int = 0
    digest: str = ""


@dataclass
class Items:
    """The images and videos of one request on their way through the processor.

    Attributes:
        hashes: by which vLLM tells each from others, our options aside.
        options: of each, in force.
        requested: the threshold of each before load lowered it.
        cached: whether vLLM's processor cache has it.
        kept: what was decided about those that it has not.
        seconds: how long that took.
        timings: when, and stage by stage.
        reports: of each, once they are known.
        skipped: by how much positions may run ahead of tokens because of all of them.
        identifiers: by which the engine tells what it encodes of each from others: the image or video, and the kept
            tokens, whatever options they come from. By the hashes that our options are part of.
    """

    hashes: Mapping[str, Sequence[str]]
    options: Mapping[str, Sequence[PruneOptions]]
    requested: Mapping[str, Sequence[float]]
    cached: dict[str, list[bool]]
    kept: dict[str, list[Kept]] = field(default_factory=lambda: defaultdict(list))
    seconds: list[float] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    reports: dict[str, list[ItemReport]] = field(default_factory=lambda: defaultdict(list))
    skipped: int = 0
    identifiers: dict[str, str] = field(default_factory=dict)


def report_of(kept: Kept, options: PruneOptions) -> ItemReport:
    return ItemReport(
        visual_tokens=kept.unpruned,
        kept_tokens=len(kept.placeholders),
        newline_tokens=int(kept.newlines.sum()),
        energy_threshold=options.threshold,
        energy_requested=options.threshold,
        energy_kept=kept.energy,
        bound=kept.bound,
        selector=kept.selector,
    )


@contextmanager
def refused_features(source: object) -> Iterator[None]:
    """While open, features that cannot be pruned fail the request, not the server."""
    try:
        yield
    except NonFiniteFeaturesError as error:
        if isinstance(source, Encoding):  # the client's own
            raise VLLMValidationError(str(error), parameter="messages") from None
        raise VLLMServerError(str(error)) from None


def split(hf_kwargs: Mapping[str, Any]) -> tuple[Items, dict[str, Any]]:
    """Our items, and what is left for vLLM, which must never see them."""
    others = dict(hf_kwargs)
    return others.pop(KEY), others


def joined(batch: Any, more: Any) -> Any:
    """One batch of the items of both: a tensor if they are of one shape."""
    if batch is None:
        return more
    if isinstance(batch, torch.Tensor) and batch.shape[1:] == more.shape[1:]:
        return torch.cat((batch, more))
    return [*batch, *more]


def embeddings_of(of_each: Any, index: int, fields: Mapping[str, MultiModalFieldConfig]) -> Mapping[str, Any]:
    """Precomputed embeddings of one of several items, and what came with them.

    Args:
        of_each: the items.
        index: of the one.
        fields: what vLLM says about the fields of all.
    """
    if isinstance(of_each, EmbeddingItems):
        return {f"{of_each.modality}_embeds": of_each.get(index)}
    every = MultiModalKwargsItems.from_hf_inputs(BatchFeature(dict(of_each.data)), fields)
    one = MultiModalKwargsItems({of_each.modality: [every[of_each.modality][index]]})
    return dict(one.get_data())
