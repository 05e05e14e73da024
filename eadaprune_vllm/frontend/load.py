"""Budgets that follow the load: the busier the engine, the lower the energy that images are pruned to.

Pressure is 0 up to the low watermarks and 1 from the high ones. It moves a level in few steps, so that caches still
hit, and one step late on the way back, so that it does not flutter. A threshold is lowered by the level's share of
its way to the floor; at level 0 nothing changes.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eadaprune_vllm.core.load_policy import LoadPolicy
from eadaprune_vllm.frontend.shared_table import table

STEPS = 4
# An idle engine reports nothing, and with several front ends its last reports may be taken in out of order. What it
# said counts for longer than a step takes, and not for ever.
FRESH_SECONDS = 30


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


def watch_load(engine_client: Any, observe: Callable[[int, float, int], None], show: Callable[[], None]) -> None:
    """Have ``observe`` called after each step of an engine, with its number among this server's, the share of its KV
    cache in use, and how many requests wait; of several front ends each step reaches one. And ``show`` from time to
    time, also when there are no steps."""
    from vllm.v1.metrics.loggers import AggregateStatLoggerBase

    first = engine_client.engine_core.engine_ranks_managed[0]

    class LoadLogger(AggregateStatLoggerBase):
        def __init__(self) -> None: ...

        def log_engine_initialized(self) -> None: ...

        def log(self) -> None:
            show()

        def record(self, scheduler_stats: Any, *_: Any, engine_idx: int = 0, **__: Any) -> None:
            if scheduler_stats:
                observe(engine_idx - first, scheduler_stats.kv_cache_usage, scheduler_stats.num_waiting_reqs)

    engine_client.logger_manager.stat_loggers.append(LoadLogger())
