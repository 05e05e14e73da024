"""The stages of pruning as spans in vLLM's OpenTelemetry traces."""

import time
from collections.abc import Mapping

from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from eadaprune_vllm.core.report import Pruning

_NAME = "eadaprune"
_propagator = TraceContextTextMapPropagator()


def trace_pruning(headers: Mapping[str, str] | None, pruning: Pruning) -> Mapping[str, str]:
    """Record the pruning of one prompt: a span with one child per image or video that was not cached, whose children
    are the stages.

    Args:
        headers: the client's trace context, if it sent one.
        pruning: of a prompt that is sent to the engine.

    Returns:
        Trace headers for vLLM's span of the request: the client's, or those of our span, so that both spans are in one
        trace.
    """
    tracer = trace.get_tracer("eadaprune_vllm")
    now = time.time_ns()
    started = min((timing.started for timing in pruning.timings), default=now)
    items = pruning.of()
    outer = tracer.start_span(
        _NAME,
        context=_propagator.extract(headers or {}),
        start_time=started,
        attributes={
            f"{_NAME}.visual_tokens": sum(item.visual_tokens for item in items),
            f"{_NAME}.kept_tokens": sum(item.kept_tokens for item in items),
            f"{_NAME}.items": len(items),
            f"{_NAME}.cached_items": sum(item.cached is True for item in items),
        },
    )
    within = trace.set_span_in_context(outer)
    for timing in pruning.timings:
        at = timing.started
        span = tracer.start_span(f"{_NAME}.{timing.modality}", context=within, start_time=at)
        for stage, seconds in timing.stages.items():
            end = at + int(seconds * 1e9)
            child = tracer.start_span(f"{_NAME}.{stage}", context=trace.set_span_in_context(span), start_time=at)
            child.end(end)
            at = end
        span.end(at)
    outer.end(max(now, started))
    if headers:
        return headers
    own: dict[str, str] = {}
    _propagator.inject(own, within)
    return own
