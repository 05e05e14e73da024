"""What a request says and vLLM's own request objects do not carry, and what its response will report."""

from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeVar

from eadaprune_vllm.core.options import KEY, MODALITIES
from eadaprune_vllm.core.report import Pruning, Report

T = TypeVar("T")


@dataclass
class RequestContext:
    """Of one request.

    Attributes:
        header: value of the header ``X-EAdaPrune-Energy``.
        options: the request's field ``eadaprune``.
        item_counts: how many images and videos there were so far; a batch has several prompts.
        prunings: filled in where the request is rendered.
    """

    header: str | None = None
    options: object = None
    item_counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MODALITIES, 0))
    prunings: list[Pruning] = field(default_factory=list)

    def report(self) -> Report | None:
        """What to tell the client: None if there was nothing to prune, or the server does not tell."""
        return Report.of(self.prunings) if self.prunings else None


_current: ContextVar[RequestContext] = ContextVar(KEY)


@contextmanager
def request_context(context: RequestContext) -> Iterator[RequestContext]:
    """While open, code that this task calls or starts finds ``context``."""
    token = _current.set(context)
    try:
        yield context
    finally:
        _current.reset(token)


async def in_context(chunks: AsyncIterator[T], context: RequestContext) -> AsyncGenerator[T]:
    """The chunks of a stream, whose code finds ``context`` also after the route's handler has returned. Whoever takes
    the chunks does not: what a generator sets at a ``yield`` is set for its consumer."""
    while True:
        with request_context(context):
            try:
                chunk = await anext(chunks)
            except StopAsyncIteration:
                return
        yield chunk


def current() -> RequestContext:
    """The context of the request being served; an empty one outside of requests."""
    return _current.get(None) or RequestContext()
