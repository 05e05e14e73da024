"""What a request is told about its images."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from pydantic import BaseModel, ConfigDict, Field


class ImageReport(BaseModel):
    """What became of one image; kept with its cache entry, so that a hit reports what the first request did."""

    model_config = ConfigDict(frozen=True)

    visual_tokens: int = Field(description="Tokens of the image unpruned.")
    kept_tokens: int = Field(description="Tokens that enter the engine.")
    energy_threshold: float = Field(description="The threshold in force.")
    energy_kept: float = Field(description="Share of the spectral energy that a budget of kept_tokens holds.")
    selector: str = Field(description="The selector in force.")
    cached: bool = Field(default=False, description="Whether the image came out of vLLM's processor cache.")


class ImagePreview(ImageReport):
    """What would become of one image, and why."""

    curve: list[tuple[int, float]] = Field(
        description="Up to 64 points of the image's spectrum: tokens kept, share of the energy they would hold."
    )
    overlay: str | None = Field(
        default=None, description="A PNG as data URL: what the vision tower sees, the pruned patches dark and grey."
    )


@dataclass(frozen=True)
class Pruning:
    """What became of the images of one prompt; travels with vLLM's engine input.

    Attributes:
        images: one report per image, in the order of the prompt.
        seconds: time that encoding and pruning took; images found in the cache take none.
        kv_bytes_per_token: KV cache that one token takes, over all layers.
    """

    images: Sequence[ImageReport]
    seconds: float
    kv_bytes_per_token: int


class Report(BaseModel):
    """The response field ``eadaprune``."""

    images: Sequence[ImageReport] = Field(description="One entry per image, in the order of the request.")
    visual_tokens: int = Field(description="Tokens of all images unpruned.")
    kept_tokens: int = Field(description="Tokens of all images that enter the engine.")
    tokens_saved: int = Field(description="The difference.")
    kv_cache_bytes_saved: int = Field(description="KV cache those tokens would take; an upper bound.")
    seconds: float = Field(description="Time that encoding and pruning took.")

    @classmethod
    def of(cls, prunings: Sequence[Pruning]) -> Self:
        """Sum up the prompts of one request."""
        images = [image for pruning in prunings for image in pruning.images]
        visual = sum(image.visual_tokens for image in images)
        kept = sum(image.kept_tokens for image in images)
        saved = [sum(image.visual_tokens - image.kept_tokens for image in pruning.images) for pruning in prunings]
        return cls(
            images=images,
            visual_tokens=visual,
            kept_tokens=kept,
            tokens_saved=sum(saved),
            kv_cache_bytes_saved=sum(
                tokens * pruning.kv_bytes_per_token for tokens, pruning in zip(saved, prunings, strict=True)
            ),
            seconds=round(sum(pruning.seconds for pruning in prunings), 6),
        )


class Preview(Report):
    """What would become of the images of a request."""

    images: Sequence[ImagePreview] = Field(description="One entry per image, in the order of the request.")
