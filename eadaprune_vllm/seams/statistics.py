"""What vLLM's engines report after each step."""

from collections.abc import Callable
from typing import Any


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
