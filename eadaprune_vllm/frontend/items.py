"""One request's images and videos on their way through the processor."""

import hashlib
import struct
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.multimodal.processing import PromptUpdateDetails

from eadaprune_vllm.core.options import CHUNK, KEY, MODALITIES, PruneOptions
from eadaprune_vllm.core.prune import PruneDecision
from eadaprune_vllm.core.report import ItemReport, Pruning
from eadaprune_vllm.core.server_options import Choice
from eadaprune_vllm.frontend.pending import PendingItem


def digest(placeholders: torch.Tensor, weights: float = 0.0) -> str:
    """What tells a decision from others about the same image or video.

    Args:
        placeholders: ``[p]`` int64, those that stay.
        weights: what tells those that made the rows from earlier ones.
    """
    found = hashlib.blake2b(placeholders.numpy().data, digest_size=8)
    if weights:
        found.update(struct.pack("d", weights))
    return "-" + found.hexdigest()


@dataclass
class PrunedDetails(PromptUpdateDetails):
    """Placeholders of one item, with what a cache hit repeats.

    Attributes:
        kept: the decision; None if all is kept and nothing was asked.
        num_newlines: how many placeholders are newlines.
    """

    kept: PruneDecision | None = None
    num_newlines: int = 0

    @property
    def embeds(self) -> torch.Tensor:
        """``[full]`` bool, which tokens are placeholders."""
        full = torch.tensor(self.full)
        return self.is_embed(self.full) if self.is_embed else torch.ones_like(full).bool()

    def pruned(self, kept: PruneDecision) -> "PrunedDetails":
        """What is left of it."""
        full, embeds = torch.tensor(self.full), self.embeds
        stays = ~embeds
        stays[embeds.nonzero()[:, 0][kept.placeholders]] = True
        left = embeds[stays]
        return PrunedDetails(full[stays].tolist(), self.is_embed and (lambda _: left), kept, kept.newlines)

    def report(self, item: "Item") -> ItemReport:
        kept, num_placeholders = self.kept, int(self.embeds.sum())
        options = item.options
        return ItemReport(
            visual_tokens=kept.unpruned if kept else num_placeholders,
            kept_tokens=num_placeholders,
            newline_tokens=self.num_newlines,
            energy_threshold=options.threshold,
            target=options.target if options.enabled else None,
            energy_requested=item.requested,
            spectral_energy=kept.spectral_energy if kept else 1.0,
            span_energy=kept.span_energy if kept else 1.0,
            bound=kept.bound if kept else None,
            selector=kept.selector if kept else options.selector,
            cached=item.cached,
        )


@dataclass
class Item:
    """One image or video, from its options to its report.

    Attributes:
        modality: to the client.
        image_hash: by which vLLM tells it from others, our options aside.
        mm_hash: the same with the options, where these may take tokens away.
        options: in force.
        requested: its threshold before load lowered it.
        cached: whether vLLM's processor cache has it.
    """

    modality: str
    image_hash: str
    mm_hash: str
    options: PruneOptions
    requested: float
    cached: bool = False


@dataclass
class Items:
    """The images and videos of one request.

    Attributes:
        by_modality: each, by vLLM's modality.
        pending: those that are not cached, by ``mm_hash``.
        choices: of their options.
        weights: ``FrontEnd.weights``, with which they were encoded or will be.
        reports: of each, by modality, once vLLM has processed them.
        identifiers: by ``mm_hash``, by which the engine tells what it encodes of each from others: the image or video,
            and the kept tokens, whatever options they come from.
        position_slack: by how much positions may run ahead of tokens because of all of them.
    """

    by_modality: Mapping[str, list[Item]]
    pending: dict[str, PendingItem] = field(default_factory=dict)
    choices: Mapping[str, Sequence[Choice]] = field(default_factory=dict)
    weights: float = 0.0
    reports: dict[str, list[ItemReport]] = field(default_factory=lambda: defaultdict(list))
    identifiers: dict[str, str] = field(default_factory=dict)
    position_slack: int = 0

    @property
    def any_prunable(self) -> bool:
        """Whether any may lose tokens. If none may, all is left to vLLM."""
        return any(may_prune(item.options) for items in self.by_modality.values() for item in items)

    def undecided(self) -> list[PendingItem]:
        """Those that the engine is to decide about.

        Raises:
            VLLMServerError, VLLMValidationError: if nothing could be decided about one; the latter if that is the
                client's fault.
        """
        return [
            each for each in self.pending.values() if each.needs_decision and not (each.response and each.decided())
        ]

    def add_report(self, item: Item, content: PrunedDetails) -> None:
        """Note what became of an item, from now on the next of its modality."""
        if item.modality in MODALITIES:
            self.reports[item.modality].append(content.report(item))
        # Of what vLLM sends whole it is vLLM's.
        own = "" if content.kept is None else digest(content.kept.placeholders, self.weights)
        self.identifiers[item.mm_hash] = item.image_hash + own
        self.position_slack += content.kept.position_slack if content.kept else 0

    def pruning(self, kv_bytes_per_token: int) -> Pruning:
        timings = [each.timing for each in self.pending.values() if each.timing]
        seconds = sum(sum(timing.stages.values()) for timing in timings)
        return Pruning(self.reports, seconds, kv_bytes_per_token, timings, self.identifiers)


def to_client(items: Mapping[str, Iterable[Any]]) -> dict[str, list[str]]:
    """What each item of each of vLLM's modalities is to a client: a chunk is an image, or a part of a video."""
    return {
        modality: [data["type"].removesuffix("_chunk") if modality == CHUNK else modality for data in of_modality]
        for modality, of_modality in items.items()
    }


def may_prune(options: PruneOptions) -> bool:
    """Whether an image may lose tokens under these options."""
    return options.enabled and (options.energy < 1 or options.max_tokens is not None)


def split(hf_kwargs: Mapping[str, Any]) -> tuple[Items | None, dict[str, Any]]:
    """Our items, if this is a request, and what is left for vLLM, which must never see them."""
    others = dict(hf_kwargs)
    return others.pop(KEY, None), others
