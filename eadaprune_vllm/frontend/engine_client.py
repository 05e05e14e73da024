"""Calls of engines by each kind of vLLM's engine clients."""

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import RLock, Thread
from typing import Any

from eadaprune_vllm.messages import REJECTED, UTILITY
from eadaprune_vllm.overlap import batches_in_flight

_LOCK = "_eadaprune_lock"
_WATCH_SECONDS = 1.0


def blocking_call(client: Any) -> Callable[[bytes, int], bytes] | None:
    """The blocking utility call of one of vLLM's synchronous engine clients; None for asynchronous clients."""
    if core := getattr(client, "engine_core", None):  # in this process

        def call_core(payload: bytes, num_placeholders: int) -> Any:
            with lock(client):
                return getattr(core, UTILITY)(payload, num_placeholders)

        return call_core
    if call := getattr(client, "call_utility", None):

        def call_process(payload: bytes, num_placeholders: int) -> bytes:
            """Calls on another thread, because vLLM never returns from a utility call if the engine dies."""
            result: Future[bytes] = Future()
            Thread(target=_resolve, args=(result, call, UTILITY, payload, num_placeholders), daemon=True).start()
            while not wait({result}, _WATCH_SECONDS).done:
                client.ensure_alive()
            return result.result()

        return call_process
    return None


def _resolve(result: Future[Any], function: Callable[..., Any], *args: Any) -> None:
    """Set ``result`` to what the function returns or raises."""
    try:
        result.set_result(function(*args))
    except Exception as error:
        result.set_exception(error)


def lock(client: Any) -> RLock:
    """The lock of a client, for threads that use it or its engine."""
    found: RLock = vars(client).setdefault(_LOCK, RLock())
    return found


class AsyncEngines:
    """The asynchronous utility call of an engine client. Of several engines it calls the one with the fewest calls.

    Args:
        client: vLLM's.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._number = itertools.count(client.client_index)
        self._busy: Counter[bytes] = Counter()

    @property
    def at_once(self) -> int:
        """Maximum number of concurrent calls."""
        return len(self._client.core_engines) * batches_in_flight()

    async def __call__(self, payload: bytes, num_placeholders: int) -> bytes:
        """Raises:
        EngineDeadError: if the engine dies; vLLM does not fail pending utility calls.
        RetryableRequestError: if the engine is paused and rejects requests; or if it was removed by scaling down
            (elastic EP), so that its response may never come.
        """
        from vllm.exceptions import RetryableRequestError
        from vllm.v1.engine.exceptions import EngineDeadError

        engines, first = self._client.core_engines, next(self._number)
        in_turn = (engines[(first + number) % len(engines)] for number in range(len(engines)))
        engine = min(in_turn, key=self._busy.__getitem__)
        self._busy[engine] += 1
        call = asyncio.ensure_future(
            self._client._call_utility_async(UTILITY, payload, num_placeholders, engine=engine)
        )
        try:
            while not call.done():
                await asyncio.wait({call}, timeout=_WATCH_SECONDS)
                if self._client.resources.engine_dead and not call.done():
                    raise EngineDeadError
                if engine not in self._client.core_engines and not call.done():
                    raise RetryableRequestError("The server was scaled down. Please retry.")
            responses: bytes = call.result()
            if responses == REJECTED:
                raise RetryableRequestError("Generation is paused. Please retry after it resumes.")
            return responses
        finally:
            self._busy[engine] -= 1
            call.cancel()
