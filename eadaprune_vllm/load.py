"""Budgets that follow the load: the busier the engine, the lower the energy that images are pruned to.

Pressure is 0 up to the low watermarks and 1 from the high ones. It moves a level in few steps, so that caches still
hit, and one step late on the way back, so that it does not flutter. A threshold is lowered by the level's share of
its way to the floor; at level 0 nothing changes.
"""

import math
import time
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from eadaprune_vllm.shared_table import table

STEPS = 4
# An idle engine reports nothing, and with several front ends its last reports may be taken in out of order. What it
# said counts for longer than a step takes, and not for ever.
FRESH_SECONDS = 30


class LoadPolicy(BaseModel):
    """When and how far load lowers thresholds."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    target: float = Field(default=0.15, gt=0, le=1, description="Share of tokens that stay in the mean at full load.")
    energy_floor: float | None = Field(
        default=None, gt=0, lt=1, description="Threshold at full load, in the place of what the target comes to."
    )
    kv_usage_low: float = Field(default=0.75, ge=0, lt=1, description="Share of the KV cache in use that is no load.")
    kv_usage_high: float = Field(
        default=0.95, gt=0, le=1, description="Share of the KV cache in use that is full load."
    )
    waiting_low: int = Field(default=4, ge=0, description="Requests waiting in the engine that are no load.")
    waiting_high: int = Field(default=32, ge=1, description="Requests waiting in the engine that are full load.")
    explicit: Literal["keep", "lower"] = Field(
        default="keep",
        description="What becomes of thresholds that requests ask for themselves: 'keep' honors them at any load, "
        "'lower' treats them like the default.",
    )

    @model_validator(mode="after")
    def _low_below_high(self) -> "LoadPolicy":
        for signal in ("kv_usage", "waiting"):
            low, high = getattr(self, f"{signal}_low"), getattr(self, f"{signal}_high")
            if low >= high:
                raise ValueError(f"{signal}_low={low:g} is not below {signal}_high={high:g}")
        return self

    def pressure(self, kv_usage: float, waiting: int) -> float:
        """The stronger of two signals of one engine, in [0, 1].

        Args:
            kv_usage: share of the KV cache in use.
            waiting: requests in the queue.
        """
        kv = (kv_usage - self.kv_usage_low) / (self.kv_usage_high - self.kv_usage_low)
        queue = (waiting - self.waiting_low) / (self.waiting_high - self.waiting_low)
        return min(max(kv, queue, 0.0), 1.0)


class Load:
    """The load of one server: the level, and what its engines report.

    Args:
        policy: when and how far thresholds move.
        engines: how many engines report (data parallel).
        shared: a file in which the front ends of one server share all this, because each engine reports every step
            to one of them only; None if there is only one front end.
    """

    def __init__(self, policy: LoadPolicy, engines: int = 1, shared: Path | None = None) -> None:
        self.policy = policy
        numbers = table(1 + 2 * engines, shared)
        self._level, self._pressures, self._heard = numbers[:1], numbers[1 : 1 + engines], numbers[1 + engines :]

    @property
    def level(self) -> float:
        """Share of the way from the requested threshold to the floor: a multiple of 1 / STEPS."""
        return float(self._level[0]) / STEPS if self._fresh().any() else 0.0

    def observe(self, engine: int, kv_usage: float, waiting: int) -> None:
        """Take in what one engine reports after a step. The level goes by the mean over all engines."""
        before = self.level * STEPS
        self._pressures[engine], self._heard[engine] = self.policy.pressure(kv_usage, waiting), time.monotonic()
        steps = STEPS * float((self._pressures * self._fresh()).mean())
        self._level[0] = min(max(before, math.floor(steps)), math.ceil(steps))

    def _fresh(self) -> NDArray[np.bool_]:
        """Which engines reported lately."""
        return self._heard > time.monotonic() - FRESH_SECONDS
