"""What clients are told: requests about their images and videos, whoever asks about the server. Without torch: the
commands read it where no model runs."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Self

from pydantic import BaseModel, ConfigDict, Field

from eadaprune_vllm.core.options import UNBOUNDED, Bound, PruneOptions
from eadaprune_vllm.core.server_options import ServerOptions

_DIGITS = 4  # of shares


class ItemReport(BaseModel):
    """What became of one image or video; kept with its cache entry, so that a hit reports what was done first."""

    model_config = ConfigDict(frozen=True)

    visual_tokens: int = Field(description="Tokens unpruned.")
    kept_tokens: int = Field(description="Tokens that enter the engine.")
    newline_tokens: int = Field(
        default=0,
        description="How many of these end lines of the picture; some models want that, and no budget counts it.",
    )
    energy_threshold: float = Field(description="The threshold in force.")
    energy_requested: float = Field(description="The threshold asked for; load may have lowered it.")
    spectral_energy: float | None = Field(
        description="Share of the spectral energy that as many singular values hold as tokens stay; null if budgets go "
        "by span, which takes no singular values.",
    )
    span_energy: float | None = Field(
        description="Share of the energy that lies in the span of the tokens that stay, of each tile or window by "
        "itself; null where it is not known, as with other selectors than 'span'.",
    )
    target: float | None = Field(
        default=None,
        description="The mean share of tokens that the threshold stands for; null if it was named itself.",
    )
    bound: Bound | None = Field(
        default=None, description="The option that decided on the budget in place of the threshold, if one did."
    )
    selector: str = Field(description="The selector in force.")
    cached: bool | None = Field(
        default=False, description="Whether it came out of vLLM's processor cache; null if the server does not tell."
    )


class ItemPreview(ItemReport):
    """What would become of one image or video, and why."""

    curve: list[tuple[int, float]] = Field(
        description="Up to 64 points of its spectrum: tokens kept, share of the energy they would hold."
    )
    spectrum: list[float] | None = Field(
        default=None,
        description="Ascending, one entry per token: the threshold above which a budget of so many tokens as there "
        "are entries before it is too small.",
    )
    overlay: str | None = Field(
        default=None, description="A PNG as data URL: the picture, or pictures, with the pruned patches dark and grey."
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
    """What became of the images and videos of one prompt; travels with vLLM's engine input.

    Attributes:
        reports: one per image and per video, by modality, in the order of the prompt.
        seconds: time that encoding and pruning took, if it is told; what was found in the cache takes none.
        kv_bytes_per_token: KV cache that one token takes, over all layers.
        timings: of those images and videos that were not found in the cache.
        identifiers: by which the engine tells what it encodes from others, by vLLM's hashes.
    """

    reports: Mapping[str, Sequence[ItemReport]]
    seconds: float | None
    kv_bytes_per_token: int
    timings: Sequence[Timing] = ()
    identifiers: Mapping[str, str] = field(default_factory=dict)

    def without_cache(self) -> Self:
        """The same without what tells whether anyone sent an image or video before."""
        reports = {
            modality: [report.model_copy(update={"cached": None}) for report in reports]
            for modality, reports in self.reports.items()
        }
        return replace(self, reports=reports, seconds=None)

    def of(self, *modalities: str) -> list[ItemReport]:
        """The reports of some modalities, by default of all."""
        return [report for modality in modalities or self.reports for report in self.reports.get(modality, ())]


class Report(BaseModel):
    """The response field ``eadaprune``."""

    images: Sequence[ItemReport] = Field(description="One entry per image, in the order of the request.")
    videos: Sequence[ItemReport] = Field(description="One entry per video, in the order of the request.")
    visual_tokens: int = Field(description="Tokens of all of them unpruned.")
    kept_tokens: int = Field(description="Tokens of all of them that enter the engine.")
    tokens_saved: int = Field(description="The difference.")
    kv_cache_bytes_saved: int = Field(description="KV cache those tokens would take; an upper bound.")
    seconds: float | None = Field(description="Time that encoding and pruning took; null if the server does not tell.")

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
    """What would become of the images and videos of a request."""

    images: Sequence[ItemPreview] = Field(description="One entry per image, in the order of the request.")
    videos: Sequence[ItemPreview] = Field(description="One entry per video, in the order of the request.")


class Reference(BaseModel):
    """What the defaults keep of the pictures by which targets become thresholds."""

    options: PruneOptions = Field(description="The defaults, with the threshold that the target stands for.")
    kept: float = Field(description="Share of their tokens that the pictures keep on average.")
    kept_by_kind: dict[str, float] = Field(description="The same for each kind of picture.")
    at_bound: float = Field(description="Share of the pictures whose budget is that of a bound, not of the threshold.")
    min_target: float = Field(description="The least share that a request may ask for.")
    max_target: float = Field(description="The largest; the model's features have no larger rank.")
    most_default_target: float = Field(description="The largest of the server's own; beyond it budgets hardly differ.")

    @classmethod
    def of(cls, server: ServerOptions) -> Self:
        """Args:
        server: with targets known.
        """
        targets, options = server.targets, server.resolve()
        assert targets, "it was informed before"
        shares, free = defaultdict[str, list[float]](list), options.model_copy(update=UNBOUNDED)
        for curve in targets.curves:
            shares[curve.name].append(curve.share(options))
        return cls(
            options=options,
            kept=_share(share for of_kind in shares.values() for share in of_kind),
            kept_by_kind={kind: _share(of_kind) for kind, of_kind in sorted(shares.items())},
            at_bound=_share(float(curve.budget(options) != curve.budget(free)) for curve in targets.curves),
            min_target=round(targets.least, _DIGITS),
            max_target=round(targets.most, _DIGITS),
            most_default_target=round(targets.max_default_target, _DIGITS),
        )

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind}s {share:.0%}" for kind, share in self.kept_by_kind.items())
        return f"energy {self.options.threshold:g} keeps {self.kept:.0%} of the tokens of reference pictures: {kinds}"


def _share(values: Iterable[float]) -> float:
    return round(mean(values), _DIGITS)


class Config(BaseModel):
    """What this server does by default, and what requests may ask for."""

    version: str
    vllm_version: str
    models: list[str] = Field(description="Names the model is served under.")
    architecture: str
    dtype: str = Field(description="What the model computes in; budgets may depend on it.")
    options: ServerOptions
    reference: Reference
    selectors: list[str]
    endpoints: list[str] = Field(description="Routes that take the field eadaprune; all others refuse it.")
