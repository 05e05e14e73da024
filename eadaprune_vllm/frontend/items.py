"""The images and videos of one request, with their options, decisions and reports."""

import hashlib
import struct
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.multimodal.processing import PromptUpdateDetails

from eadaprune_vllm.core.item_report import ItemReport
from eadaprune_vllm.core.layout import Layout
from eadaprune_vllm.core.options import CHUNK, KEY, MODALITIES, PruneOptions
from eadaprune_vllm.core.prune import PruneDecision
from eadaprune_vllm.core.report import Pruning
from eadaprune_vllm.core.server_options import Choice
from eadaprune_vllm.core.transfer import TransferredItem
from eadaprune_vllm.frontend.pending import PendingItem


def digest(placeholders: torch.Tensor, weights_changed_at: float = 0.0) -> str:
    """The suffix of an image's identifier that tells decisions about it apart. Hexadecimal like the rest of it: LMCache
    takes the number's last 16 bits.

    Args:
        placeholders: ``[p]`` int64, the kept placeholders.
        weights_changed_at: ``FrontEnd.weights_changed_at`` when it was encoded.
    """
    found = hashlib.blake2b(placeholders.numpy().data, digest_size=8)
    if weights_changed_at:
        found.update(struct.pack("d", weights_changed_at))
    return found.hexdigest()


@dataclass
class PrunedDetails(PromptUpdateDetails):
    """vLLM's details of an item's placeholders, with what a cache hit reports.

    Attributes:
        decision: None if everything is kept without a decision.
        num_newlines: placeholders that are newlines.
        layout: of the unpruned item; None after pruning.
    """

    decision: PruneDecision | None = None
    num_newlines: int = 0
    layout: Layout | None = None

    @property
    def embeds(self) -> torch.Tensor:
        """``[full]`` bool, which tokens are placeholders of embeddings."""
        full = torch.tensor(self.full)
        return self.is_embed(self.full) if self.is_embed else torch.ones_like(full).bool()

    def pruned(self, decision: PruneDecision) -> "PrunedDetails":
        """The details after pruning."""
        full, embeds = torch.tensor(self.full), self.embeds
        is_kept = ~embeds
        is_kept[embeds.nonzero()[:, 0][decision.placeholders]] = True
        kept_embeds = embeds[is_kept]
        is_embed = self.is_embed and (lambda _: kept_embeds)
        return PrunedDetails(full[is_kept].tolist(), is_embed, decision, decision.newlines)

    def report(self, item: "Item") -> ItemReport:
        if item.transferred:
            return item.transferred.report.model_copy(update={"cached": item.cached})
        decision, num_placeholders = self.decision, int(self.embeds.sum())
        options = item.options
        return ItemReport(
            visual_tokens=decision.unpruned if decision else num_placeholders,
            kept_tokens=num_placeholders,
            newline_tokens=self.num_newlines,
            energy_threshold=options.threshold,
            target=options.target if options.enabled else None,
            energy_requested=item.requested,
            spectral_energy=decision.spectral_energy if decision else 1.0,
            span_energy=decision.span_energy if decision else 1.0,
            bound=decision.bound if decision else None,
            selector=decision.selector if decision else options.selector,
            cached=item.cached,
        )


@dataclass
class Item:
    """One image or video of a request.

    Attributes:
        modality: the client's, ``image`` or ``video`` if it can be pruned.
        image_hash: vLLM's ``mm_hash``, without our options.
        mm_hash: the key in vLLM's caches: ``image_hash``, or a hash of it and the options if these may drop tokens.
        options: effective.
        requested: threshold before load lowered it.
        cached: whether vLLM's processor cache has it.
        transferred: the decision of another instance.
    """

    modality: str
    image_hash: str
    mm_hash: str
    options: PruneOptions
    requested: float
    cached: bool = False
    transferred: TransferredItem | None = None

    @property
    def may_be_pruned(self) -> bool:
        """Whether it may lose tokens."""
        return may_prune(self.options) if self.transferred is None else self.transferred.kept is not None


@dataclass
class Items:
    """The images and videos of one request.

    Attributes:
        by_modality: all items, by vLLM's modality.
        pending: items that are not cached, by ``mm_hash``.
        choices: options without load.
        weights_changed_at: ``FrontEnd.weights_changed_at`` of the weights that encode them.
        reports: by modality, once vLLM has processed the items.
        decisions: like the reports, for other instances.
        decided: the same, by identifier.
        identifiers: by ``mm_hash``, the identifiers in the engine's caches. They consist of image and kept tokens: two
            options that keep the same tokens share an entry.
        position_slack: upper bound of M-RoPE positions minus tokens, over all items.
    """

    by_modality: Mapping[str, list[Item]]
    pending: dict[str, PendingItem] = field(default_factory=dict)
    choices: Mapping[str, Sequence[Choice]] = field(default_factory=dict)
    weights_changed_at: float = 0.0
    reports: dict[str, list[ItemReport]] = field(default_factory=lambda: defaultdict(list))
    decisions: dict[str, list[TransferredItem]] = field(default_factory=lambda: defaultdict(list))
    decided: dict[str, TransferredItem] = field(default_factory=dict)
    identifiers: dict[str, str] = field(default_factory=dict)
    position_slack: int = 0

    @property
    def any_prunable(self) -> bool:
        """Whether any item may lose tokens. If none may, vLLM processes the request unchanged."""
        return any(item.may_be_pruned for items in self.by_modality.values() for item in items)

    def undecided(self) -> list[PendingItem]:
        """The items that still need a decision.

        Raises:
            VLLMServerError, VLLMValidationError: if the decision about an item failed; the latter if that is the
                client's fault.
        """
        return [
            each for each in self.pending.values() if each.needs_decision and not (each.response and each.decided())
        ]

    def add_report(self, item: Item, content: PrunedDetails) -> None:
        """Add the report of an item, in the order of the prompt, and its identifier."""
        decision = content.decision
        # Without a decision the identifier is vLLM's.
        suffix = digest(decision.placeholders, self.weights_changed_at) if decision else ""
        identifier = self.identifiers[item.mm_hash] = item.image_hash + suffix
        if item.modality in MODALITIES:
            report = content.report(item)
            placeholders = decision.placeholders.numpy() if decision else None
            self.reports[item.modality].append(report)
            self.decided[identifier] = TransferredItem.of(item.image_hash, placeholders, report)
            self.decisions[item.modality].append(self.decided[identifier])
        self.position_slack += decision.position_slack if decision else 0

    def pruning(self, kv_bytes_per_token: int) -> Pruning:
        """What happened to all of them, for vLLM's engine input."""
        timings = [each.timing for each in self.pending.values() if each.timing]
        seconds = sum(sum(timing.stages.values()) for timing in timings)
        return Pruning(
            self.reports, seconds, kv_bytes_per_token, timings, self.identifiers, self.decisions, self.decided
        )


def client_modalities(items: Mapping[str, Iterable[Any]]) -> dict[str, list[str]]:
    """The client's modality of each item, by vLLM's modality: a vision chunk is an image, or a part of a video."""
    return {
        modality: [data["type"].removesuffix("_chunk") if modality == CHUNK else modality for data in mm_items]
        for modality, mm_items in items.items()
    }


def may_prune(options: PruneOptions) -> bool:
    """Whether an image may lose tokens with these options."""
    return options.enabled and (options.energy < 1 or options.max_tokens is not None)


def split(hf_kwargs: Mapping[str, Any], key: str = KEY) -> tuple[Any, dict[str, Any]]:
    """Split off our value from vLLM's keyword arguments of the processor; None if there is none."""
    others = dict(hf_kwargs)
    return others.pop(key, None), others
