"""What clients get to see of a server: options, endpoints, and what its defaults keep of the reference pictures.

Without torch, because commands use it on machines without a model.
"""

from collections import defaultdict
from collections.abc import Iterable
from statistics import mean
from typing import Self

from pydantic import BaseModel, Field

from eadaprune_vllm.core.options import UNBOUNDED, PruneOptions
from eadaprune_vllm.core.server_options import ServerOptions
from eadaprune_vllm.core.words import percent

_DIGITS = 4  # of shares


class Reference(BaseModel):
    """What the defaults keep of the reference pictures, which translate targets into thresholds."""

    kept: float = Field(description="Share of their tokens that the reference pictures keep on average.")
    kept_by_kind: dict[str, float] = Field(description="The same share for each kind of picture.")
    at_bound: float = Field(
        description="Share of the reference pictures whose budget is determined by min_share, min_tokens or "
        "max_tokens instead of the threshold."
    )
    min_target: float = Field(description="The smallest target that a request may set.")
    max_target: float = Field(description="The largest target that a request may set; the features' rank limits it.")
    max_default_target: float = Field(
        description="The largest default target; above it the budgets of different images hardly differ."
    )

    @classmethod
    def of(cls, server: ServerOptions) -> Self:
        """Args:
        server: with curves.
        """
        targets, options = server.targets, server.resolve()
        assert targets, "set_curves was called before"
        shares, free = defaultdict[str, list[float]](list), options.model_copy(update=UNBOUNDED)
        for curve in targets.curves:
            shares[curve.name].append(curve.share(options))
        return cls(
            kept=_share(share for of_kind in shares.values() for share in of_kind),
            kept_by_kind={kind: _share(of_kind) for kind, of_kind in sorted(shares.items())},
            at_bound=_share(float(curve.budget(options) != curve.budget(free)) for curve in targets.curves),
            min_target=round(targets.min_target, _DIGITS),
            max_target=round(targets.max_target, _DIGITS),
            max_default_target=round(targets.max_default_target, _DIGITS),
        )

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind}s {percent(share)}" for kind, share in self.kept_by_kind.items())
        kept = percent(self.kept)
        return f"{kept} of the tokens of reference pictures: {kinds}"


def _share(values: Iterable[float]) -> float:
    return round(mean(values), _DIGITS)


class Config(BaseModel):
    """The server's defaults, and what requests may set."""

    version: str
    vllm_version: str
    models: list[str] = Field(description="Names that the model is served under.")
    architecture: str
    dtype: str = Field(description="The model's dtype; budgets may depend on it.")
    configured: ServerOptions = Field(description="The operator's options, as they were set.")
    effective: PruneOptions = Field(description="What they come to for a request without options: its energy counts.")
    reference: Reference
    selectors: list[str]
    endpoints: list[str] = Field(description="Endpoints that take the field eadaprune; all others reject it.")
