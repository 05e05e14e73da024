"""The report of one image or video.

Without torch, because commands use it on machines without a model.
"""

from pydantic import BaseModel, ConfigDict, Field

from eadaprune_vllm.core.options import Bound


class ItemReport(BaseModel):
    """The decision about one image or video. It is stored with the cache entry, so a cache hit reports it again."""

    model_config = ConfigDict(frozen=True)

    visual_tokens: int = Field(description="Tokens without pruning.")
    kept_tokens: int = Field(description="Tokens that enter the engine.")
    newline_tokens: int = Field(
        default=0,
        description="How many of the kept tokens are newlines, which some models put between the lines of a picture. "
        "No budget counts them.",
    )
    energy_threshold: float = Field(description="The effective threshold.")
    energy_requested: float = Field(description="The threshold before load lowered it.")
    spectral_energy: float | None = Field(
        description="Share of the energy in the k largest squared singular values, for k kept tokens; null with "
        "budgets by span, which compute no singular values.",
    )
    span_energy: float | None = Field(
        description="Share of the energy in the span of the kept tokens, of each tile or window by itself; null if it "
        "is not known, as with selectors other than 'span'.",
    )
    target: float | None = Field(
        default=None,
        description="The target that the threshold comes from: a mean share of tokens; null if the threshold was set "
        "directly.",
    )
    bound: Bound | None = Field(
        default=None, description="The option that determined the budget instead of the threshold, if one did."
    )
    selector: str = Field(description="The selector that was used.")
    cached: bool | None = Field(
        default=False,
        description="Whether it was found in vLLM's processor cache; null if the server does not report that.",
    )
