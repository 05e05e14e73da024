"""When, and by how much, the load of the engines lowers thresholds."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class LoadPolicy(BaseModel):
    """When, and by how much, load lowers thresholds."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    target: float = Field(default=0.15, gt=0, le=1, description="Share of tokens that stay on average at full load.")
    energy_floor: float | None = Field(
        default=None, gt=0, lt=1, description="Threshold at full load, instead of the target's."
    )
    kv_usage_low: float = Field(
        default=0.75, ge=0, lt=1, description="KV cache usage up to which there is no load (0 to 1)."
    )
    kv_usage_high: float = Field(
        default=0.95, gt=0, le=1, description="KV cache usage from which load is full (0 to 1)."
    )
    waiting_low: int = Field(default=4, ge=0, description="Waiting requests up to which there is no load.")
    waiting_high: int = Field(default=32, ge=1, description="Waiting requests from which load is full.")
    explicit: Literal["keep", "lower"] = Field(
        default="keep",
        description="Whether load lowers thresholds that a request sets itself: 'keep' leaves them, 'lower' treats "
        "them like the default.",
    )

    @model_validator(mode="after")
    def _low_below_high(self) -> "LoadPolicy":
        for signal in ("kv_usage", "waiting"):
            low, high = getattr(self, f"{signal}_low"), getattr(self, f"{signal}_high")
            if low >= high:
                raise ValueError(f"{signal}_low={low:g} is not below {signal}_high={high:g}")
        return self

    def pressure(self, kv_usage: float, waiting: int) -> float:
        """The load of one engine, in [0, 1]: the larger of the two signals.

        Args:
            kv_usage: share of the KV cache in use.
            waiting: requests in the queue.
        """
        kv = (kv_usage - self.kv_usage_low) / (self.kv_usage_high - self.kv_usage_low)
        queue = (waiting - self.waiting_low) / (self.waiting_high - self.waiting_low)
        return min(max(kv, queue, 0.0), 1.0)
