"""Time and order on the device: when the encoder is done, how long it took, and a stream beside the engine's."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch


@dataclass
class Clock:
    """A span of work that is launched by this thread. On CUDA devices these are events, so that nothing waits.

    Attributes:
        device: that works.
        start: an event, or seconds.
        end: the same, once it is stopped.
    """

    device: torch.device
    start: Any
    end: Any = None

    @classmethod
    def now(cls, device: torch.device) -> Self:
        """Start a span."""
        return cls(device, cls._mark(device))

    def stop(self) -> None:
        """End the span."""
        self.end = self._mark(self.device)

    def seconds(self) -> float:
        """How long the work took; waits for it."""
        if self.device.type != "cuda":
            return float(self.end - self.start)
        self.end.synchronize()
        return float(self.start.elapsed_time(self.end)) / 1000

    @staticmethod
    def _mark(device: torch.device) -> Any:
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        return event


_streams: dict[torch.device, Any] = {}


@contextmanager
def beside(launched: Clock) -> Iterator[None]:
    """Context manager: work of this thread runs beside the engine's stream, after the work that was launched there
    before ``launched`` started. Waits for that work, and at the end for its own: then memory of both can be freed."""
    if launched.device.type != "cuda":
        yield
        return
    stream = _streams.setdefault(launched.device, torch.cuda.Stream(launched.device))  # type: ignore[no-untyped-call]
    launched.start.synchronize()
    with torch.cuda.device(launched.device), torch.cuda.stream(stream):
        yield
        stream.synchronize()
