"""Order and time on the device: the engine's stream, the stream of decisions beside it, and how long work takes.

On devices other than CUDA's nothing is launched without waiting, so there is nothing to order.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch

_STREAM = "_eadaprune_stream"
_streams: dict[torch.device, Any] = {}  # of decisions


@dataclass
class Stopwatch:
    """Work that this thread launches between two points. Nothing waits for it until ``seconds``.

    Attributes:
        device: that works.
        start: an event, or seconds.
        end: the same, once the span is stopped.
    """

    device: torch.device
    start: Any
    end: Any = None

    @classmethod
    def begin(cls, device: torch.device) -> Self:
        """A stopwatch that starts now."""
        return cls(device, cls._point(device))

    def stop(self) -> None:
        """End the measured work."""
        self.end = self._point(self.device)

    def seconds(self) -> float:
        """How long the work took; waits for it."""
        if self.device.type != "cuda":
            return float(self.end - self.start)
        self.end.synchronize()
        return float(self.start.elapsed_time(self.end)) / 1000

    @staticmethod
    def _point(device: torch.device) -> Any:
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        return event


def on_engine_stream(runner: Any) -> Any:
    """Context manager: this thread launches on the stream of vLLM's model runner. The first call must be made by the
    engine's thread. Later ones may be by others, as with ``LLM.embed`` and an engine in this process."""
    device = runner.device
    if device.type != "cuda":
        return nullcontext()
    return torch.cuda.stream(vars(runner).setdefault(_STREAM, torch.cuda.current_stream(device)))


@contextmanager
def beside_engine(launched: Stopwatch) -> Iterator[None]:
    """Context manager: this thread launches on the stream of decisions, after the work that was launched before the
    stopwatch was stopped. At the end it waits for its own work: memory of either stream can be freed then."""
    device = launched.device
    if device.type != "cuda":
        yield
        return
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    launched.end.synchronize()
    with torch.cuda.device(device), torch.cuda.stream(_streams[device]):
        yield
        _streams[device].synchronize()
