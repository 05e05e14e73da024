"""The decision client of a front end. It sends the decision requests of all its requests in batches, to each engine as
many at a time as it may have."""

import asyncio
import concurrent.futures
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

from eadaprune_vllm.frontend.engine_client import AsyncEngines, blocking_call
from eadaprune_vllm.messages import DecisionError, DecisionRequest, DecisionResponse, pack, unpack_responses
from eadaprune_vllm.overlap import batches_in_flight

_Future = asyncio.Future[DecisionResponse] | concurrent.futures.Future[DecisionResponse]


@dataclass(eq=False)
class _Pending:
    """A decision request that is needed by one request, or by several with the same image."""

    request: DecisionRequest
    futures: list[_Future]
    is_sent: bool = False

    @property
    def is_wanted(self) -> bool:
        """Whether it has to be sent: it was not yet, and someone waits for the response."""
        return not self.is_sent and not all(future.done() for future in self.futures)


_Queue = deque[_Pending]


class DecisionClient:
    """The decision client of one front end.

    Args:
        max_encoder_tokens: maximum number of placeholders in all batches of an engine, unless a single item has more.
            vLLM profiles the encoder's memory with this number.
    """

    def __init__(self, max_encoder_tokens: int) -> None:
        self.max_batch_tokens = max_encoder_tokens // batches_in_flight()
        self._call: Callable[[bytes, int], bytes] | None = None
        self._call_async: AsyncEngines | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._queues: deque[_Queue] = deque()  # one per call of ``decide``
        self._pending: WeakValueDictionary[int, _Pending] = WeakValueDictionary()  # by the id of the decision request
        self._senders: set[asyncio.Task[None]] = set()

    def connect(self, client: Any) -> None:
        """Use this engine client of vLLM's."""
        self._call = blocking_call(client)
        if not self._call:
            self._call_async = AsyncEngines(client)
            self._loop = _running_loop()  # if there is none yet, the first request has it

    async def decide(self, requests: Sequence[DecisionRequest]) -> list[DecisionResponse]:
        """Send the decision requests of one request, and wait for the responses.

        Batches take one decision request of each caller in turn. After an error the rest of the caller's decision
        requests is not sent, nor is it if the caller is cancelled. The same object, passed by several callers, is sent
        once.

        Returns:
            The responses, up to the first error.

        Raises:
            EngineDeadError: if the engine dies.
            RetryableRequestError: if the engine rejects requests, or was removed by scaling down.
        """
        self._loop = asyncio.get_running_loop()
        futures = self._enqueue(requests, self._loop)
        assert self._call_async, "connect was called before"
        self._senders = {task for task in self._senders if not task.done()}
        if len(self._senders) < self._call_async.at_once:
            self._senders.add(asyncio.create_task(self._send_batches(self._call_async)))
        found: list[DecisionResponse] = []
        try:
            for future in futures:
                found.append(await future)
                if isinstance(found[-1], DecisionError):
                    break
            return found
        finally:
            for future in futures:
                future.cancel()

    def decide_sync(self, requests: Sequence[DecisionRequest]) -> list[DecisionResponse]:
        """``decide`` for threads that may block.

        Raises:
            RuntimeError: on the thread of the event loop, which would wait for itself.
        """
        if self._loop:
            if self._loop is _running_loop():
                raise RuntimeError(
                    "images and videos of raw prompts cannot be processed on the event loop, as in a streaming input: "
                    "pass what `await llm.renderer.render_cmpl_async(...)` makes of each prompt"
                )
            return asyncio.run_coroutine_threadsafe(self.decide(requests), self._loop).result()
        assert self._call, "connect was called before"
        found: list[DecisionResponse] = []
        queues = deque([deque(_Pending(request, [concurrent.futures.Future()]) for request in requests)])
        while not any(isinstance(response, DecisionError) for response in found):
            batch = _next_batch(queues, self.max_batch_tokens)
            if not batch:
                break
            payload = pack([pending.request for pending in batch])
            found += unpack_responses(self._call(payload, _num_placeholders(batch)))
        return found

    def _enqueue(
        self, requests: Sequence[DecisionRequest], loop: asyncio.AbstractEventLoop
    ) -> list[asyncio.Future[DecisionResponse]]:
        futures: list[asyncio.Future[DecisionResponse]] = [loop.create_future() for _ in requests]
        queue: _Queue = deque()
        for request, future in zip(requests, futures, strict=True):
            pending = self._pending.setdefault(id(request), _Pending(request, []))
            pending.futures.append(future)
            queue.append(pending)
        self._queues.append(queue)
        return futures

    async def _send_batches(self, call: AsyncEngines) -> None:
        while batch := _next_batch(self._queues, self.max_batch_tokens):
            try:
                payload = await asyncio.to_thread(pack, [pending.request for pending in batch])
                responses = await asyncio.to_thread(unpack_responses, await call(payload, _num_placeholders(batch)))
                results = list(zip(batch, responses, strict=True))
            except Exception as error:
                for pending in batch:
                    for future in self._close(pending):
                        future.set_exception(error)
                        future.exception()  # retrieved: a caller awaits one at a time, and asyncio would warn
            else:
                for pending, response in results:
                    for future in self._close(pending):
                        future.set_result(response)
            await asyncio.sleep(0)  # callers with an error cancel their other futures

    def _close(self, pending: _Pending) -> list[_Future]:
        """Take it off the list, so that later callers send it again.

        Returns:
            The futures of callers that still wait.
        """
        self._pending.pop(id(pending.request), None)
        return [future for future in pending.futures if not future.done()]


def _running_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop of this thread, if it runs one."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _num_placeholders(batch: Sequence[_Pending]) -> int:
    return sum(pending.request.num_placeholders for pending in batch)


def _next_batch(queues: deque[_Queue], remaining: int) -> list[_Pending]:
    """Take the next batch off the queues: one decision request of each queue in turn.

    Args:
        queues: one per caller.
        remaining: maximum number of placeholders; a single item may have more.
    """
    batch: list[_Pending] = []
    while queues:
        queue = queues[0]
        while queue and not queue[0].is_wanted:
            queue.popleft()
        if not queue:
            queues.popleft()
            continue
        remaining -= queue[0].request.num_placeholders
        if batch and remaining < 0:
            break
        pending = queue.popleft()
        pending.is_sent = True
        batch.append(pending)
        queues.rotate(-1)
    return batch
