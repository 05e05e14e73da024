"""The context of a request: its pruning options, which vLLM's request objects do not carry, and its report."""

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
    """The context of one request.

    Attributes:
        header: value of the header ``X-EAdaPrune-Energy``.
        options: the request's field ``eadaprune``.
        transfer_params: with the decisions of other instances: see ``Transfer.of``.
        item_counts: images and videos of the prompts rendered so far, for error messages.
        prunings: added when prompts are rendered.
        rendered: of a raw prompt.
    """

    header: str | None = None
    options: object = None
    transfer_params: object = None
    item_counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MODALITIES, 0))
    prunings: list[Pruning] = field(default_factory=list)
    rendered: Pruning | None = None

    def report(self) -> Report | None:
        """The client's report; None if there was nothing to prune, or the server does not report."""
        return Report.of(self.prunings) if self.prunings else None


_current: ContextVar[RequestContext] = ContextVar(KEY)


@contextmanager
def request_context(context: RequestContext) -> Iterator[RequestContext]:
    """Context manager: code that this task calls or starts meanwhile finds ``context``."""
    token = _current.set(context)
    try:
        yield context
    finally:
        _current.reset(token)


async def in_context(chunks: AsyncIterator[T], context: RequestContext) -> AsyncGenerator[T]:
    """Run a stream in ``context``, also after the route's handler has returned. The consumer of the chunks does not
    see the context, which is therefore not set during a ``yield``."""
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
