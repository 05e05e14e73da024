"""What clients get to see of their images and videos: the report of a request, and previews.

Without torch, because commands use it on machines without a model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from pydantic import BaseModel, Field

from eadaprune_vllm.core.item_report import ItemReport
from eadaprune_vllm.core.transfer import TransferredItem


class ItemPreview(ItemReport):
    """What pruning would do to one image or video, and why."""

    curve: list[tuple[int, float]] = Field(
        description="Up to 64 points of the curve: kept tokens, and the share of the energy they hold."
    )
    spectrum: list[float] | None = Field(
        default=None,
        description="One entry per token, ascending: the threshold from which one token more is needed than there are "
        "entries before it.",
    )
    overlay: str | None = Field(
        default=None, description="The picture, or pictures, with pruned patches dark and grey: a JPEG as data URL."
    )


@dataclass(frozen=True)
class Timing:
    """When one image or video was pruned.

    Attributes:
        modality: vLLM's, mostly ``image`` or ``video``.
        started: nanoseconds since the epoch.
        stages: seconds that each took, one after the other; stages whose result was at hand are missing.
    """

    modality: str
    started: int
    stages: Mapping[str, float]


@dataclass(frozen=True)
class Pruning:
    """The decisions about the images and videos of one prompt; part of vLLM's engine input.

    Attributes:
        reports: one per image and per video, by modality, in the order of the prompt.
        seconds: time of encoding and pruning, without cached items; None if the server does not report it.
        kv_bytes_per_token: KV cache of one token, over all layers, in bytes.
        timings: of the images and videos that were not cached.
        identifiers: by vLLM's ``mm_hash``, the identifier of each item in the engine's caches.
        decisions: like the reports, for other instances.
        decided: the same, by identifier.
    """

    reports: Mapping[str, Sequence[ItemReport]]
    seconds: float | None
    kv_bytes_per_token: int
    timings: Sequence[Timing] = ()
    identifiers: Mapping[str, str] = field(default_factory=dict)
    decisions: Mapping[str, Sequence[TransferredItem]] = field(default_factory=dict)
    decided: Mapping[str, TransferredItem] = field(default_factory=dict)

    def without_cache(self) -> Self:
        """A copy that does not reveal whether an image or video was sent before."""
        reports = {
            modality: [report.model_copy(update={"cached": None}) for report in reports]
            for modality, reports in self.reports.items()
        }
        return replace(self, reports=reports, seconds=None)

    def of(self, *modalities: str) -> list[ItemReport]:
        """The reports of these modalities, by default of all."""
        return [report for modality in modalities or self.reports for report in self.reports.get(modality, ())]


class Report(BaseModel):
    """The response field ``eadaprune``."""

    images: Sequence[ItemReport] = Field(description="One entry per image, in the order of the request.")
    videos: Sequence[ItemReport] = Field(description="One entry per video, in the order of the request.")
    visual_tokens: int = Field(description="Tokens of all images and videos without pruning.")
    kept_tokens: int = Field(description="Tokens of all images and videos that enter the engine.")
    tokens_saved: int = Field(description="visual_tokens minus kept_tokens.")
    kv_cache_bytes_saved: int = Field(description="KV cache that these tokens would take, in bytes; an upper bound.")
    seconds: float | None = Field(
        description="Time of encoding and pruning, without cached items; null if the server does not report it."
    )

    @classmethod
    def of(cls, prunings: Sequence[Pruning]) -> Self:
        """Sum up the prompts of one request."""
        items = [item for pruning in prunings for item in pruning.of()]
        seconds = [pruning.seconds for pruning in prunings if pruning.seconds is not None]
        saved = [sum(item.visual_tokens - item.kept_tokens for item in pruning.of()) for pruning in prunings]
        return cls(
            images=[image for pruning in prunings for image in pruning.of("image")],
            videos=[video for pruning in prunings for video in pruning.of("video")],
            visual_tokens=sum(item.visual_tokens for item in items),
            kept_tokens=sum(item.kept_tokens for item in items),
            tokens_saved=sum(saved),
            kv_cache_bytes_saved=sum(
                tokens * pruning.kv_bytes_per_token for tokens, pruning in zip(saved, prunings, strict=True)
            ),
            seconds=round(sum(seconds), 6) if seconds else None,
        )


class Preview(Report):
    """What pruning would do to the images and videos of a request."""

    images: Sequence[ItemPreview] = Field(description="One entry per image, in the order of the request.")
    videos: Sequence[ItemPreview] = Field(description="One entry per video, in the order of the request.")
