"""Thresholds that follow the load of the engines.

The pressure of an engine is 0 up to the low watermarks and 1 from the high ones. The level follows the mean pressure in
few steps, so that caches still hit, and falls one step late, so that it does not flutter. The level is the share of the
distance to its floor by which a threshold is lowered; at level 0 nothing changes.
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
# An idle engine sends no reports, and several front ends may take in its last ones out of order. So reports expire, but
# not before the next step.
FRESH_SECONDS = 30


class Load:
    """The load of one server.

    Args:
        policy: of the operator.
        engines: number of engines (data parallel).
        shared: a file that the front ends of one server share, because an engine reports each step to one of them only;
            None if there is only one front end.
    """

    def __init__(self, policy: LoadPolicy, engines: int = 1, shared: Path | None = None) -> None:
        self.policy = policy
        numbers = table(1 + 2 * engines, shared)
        self._level, self._pressures, self._reported_at = np.split(numbers, [1, 1 + engines])

    @property
    def level(self) -> float:
        """Share of the distance from a threshold to its floor: a multiple of 1 / STEPS."""
        return float(self._level[0]) / STEPS if self._fresh().any() else 0.0

    def observe(self, engine: int, kv_usage: float, waiting: int) -> None:
        """Take in the report of one engine. The level follows the mean over all engines."""
        before = self.level * STEPS
        self._pressures[engine], self._reported_at[engine] = self.policy.pressure(kv_usage, waiting), time.monotonic()
        steps = STEPS * float((self._pressures * self._fresh()).mean())
        self._level[0] = min(max(before, math.floor(steps)), math.ceil(steps))

    def _fresh(self) -> NDArray[np.bool_]:
        """Which engines have a report that has not expired."""
        return self._reported_at > time.monotonic() - FRESH_SECONDS


def watch_load(engine_client: Any, observe: Callable[[int, float, int], None], show: Callable[[], None]) -> None:
    """Follow the engines' statistics with a stat logger of vLLM's.

    Args:
        engine_client: vLLM's ``AsyncLLM``.
        observe: called after each step with the engine's number, its KV cache usage (0 to 1) and its waiting requests;
            of several front ends in one of them.
        show: called from time to time, also without steps.
    """
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
