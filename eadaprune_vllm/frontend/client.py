"""Asking the engines what to keep: questions of all requests that wait travel together, one call at a time to each."""

import asyncio
import concurrent.futures
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

from eadaprune_vllm.frontend.engine_client import AsyncEngines, blocking
from eadaprune_vllm.messages import DecisionError, DecisionRequest, DecisionResponse, pack, unpack_responses

_Future = asyncio.Future[DecisionResponse] | concurrent.futures.Future[DecisionResponse]


@dataclass(eq=False)
class _Asked:
    """A question, of one request or of several that sent the same."""

    question: DecisionRequest
    promises: list[_Future]
    sent: bool = False

    @property
    def waits(self) -> bool:
        """Whether it is still to be sent: somebody waits for the answer."""
        return not self.sent and not all(promise.done() for promise in self.promises)


_Waiting = deque[_Asked]


class DecisionClient:
    """Of one front end.

    Args:
        most: placeholders of one call, unless a single image or video has more. vLLM measures the encoder's memory
            with so many.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._ask: Callable[[bytes], bytes] | None = None
        self._ask_async: AsyncEngines | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._requests: deque[_Waiting] = deque()
        self._open: WeakValueDictionary[int, _Asked] = WeakValueDictionary()  # not answered, by the question's id
        self._tasks: set[asyncio.Task[None]] = set()

    def connect(self, client: Any) -> None:
        """Ask by this engine client of vLLM's."""
        self._ask = blocking(client)
        if not self._ask:
            self._ask_async = AsyncEngines(client)
            self._loop = _running_loop()  # or else it is known with the first question

    async def ask(self, questions: Sequence[DecisionRequest]) -> list[DecisionResponse]:
        """The answers to the questions of one request, up to the first that failed. They wait their turn: of every
        request one, and again. What is cancelled is not asked, and neither is what a request with a failed one still
        has; what others ask too, the same object, is asked once.

        Raises:
            EngineDeadError: if the engine dies.
            RetryableRequestError: if it refuses requests, or is gone because the server was scaled down.
        """
        self._loop = asyncio.get_running_loop()
        promises = self._enter(questions, self._loop)
        assert self._ask_async, "images and videos come after the engine"
        self._tasks = {task for task in self._tasks if not task.done()}
        if len(self._tasks) < self._ask_async.at_once:
            self._tasks.add(asyncio.create_task(self._run()))
        found: list[DecisionResponse] = []
        try:
            for promise in promises:
                found.append(await promise)
                if isinstance(found[-1], DecisionError):
                    break
            return found
        finally:
            for promise in promises:
                promise.cancel()

    def _enter(
        self, questions: Sequence[DecisionRequest], loop: asyncio.AbstractEventLoop
    ) -> list[asyncio.Future[DecisionResponse]]:
        promises: list[asyncio.Future[DecisionResponse]] = [loop.create_future() for _ in questions]
        waiting: _Waiting = deque()
        for question, promise in zip(questions, promises, strict=True):
            asked = self._open.setdefault(id(question), _Asked(question, []))
            asked.promises.append(promise)
            waiting.append(asked)
        self._requests.append(waiting)
        return promises

    def decide_sync(self, questions: Sequence[DecisionRequest]) -> list[DecisionResponse]:
        """The same from a thread that may wait.

        Raises:
            RuntimeError: on the thread of the event loop, which would wait for itself.
        """
        if self._loop:
            if self._loop is _running_loop():
                raise RuntimeError(
                    "images and videos of raw prompts cannot be processed on the event loop, as in a streaming input: "
                    "pass what `await llm.renderer.render_cmpl_async(...)` makes of each prompt"
                )
            return asyncio.run_coroutine_threadsafe(self.ask(questions), self._loop).result()
        assert self._ask, "images and videos come after the engine"
        found: list[DecisionResponse] = []
        waiting: _Waiting = deque(_Asked(question, [concurrent.futures.Future()]) for question in questions)
        while (batch := _next(deque([waiting]), self.most)) and not any(
            isinstance(each, DecisionError) for each in found
        ):
            found += unpack_responses(self._ask(pack([asked.question for asked in batch])))
        return found

    async def _run(self) -> None:
        assert self._ask_async, "images and videos come after the engine"
        while batch := _next(self._requests, self.most):
            try:
                payload = await asyncio.to_thread(pack, [asked.question for asked in batch])
                found = await asyncio.to_thread(unpack_responses, await self._ask_async(payload))
                answered = list(zip(batch, found, strict=True))
            except Exception as error:
                for asked in batch:
                    for promise in self._close(asked):
                        promise.set_exception(error)
                        promise.exception()  # a request waits for one at a time, and asyncio warns of the others
            else:
                for asked, answer in answered:
                    for promise in self._close(asked):
                        promise.set_result(answer)
            await asyncio.sleep(0)  # requests of which a question failed take the others back

    def _close(self, asked: _Asked) -> list[_Future]:
        """Those who still wait for its answer; from now on, who asks the same is answered anew."""
        self._open.pop(id(asked.question), None)
        return [promise for promise in asked.promises if not promise.done()]


def _running_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop that this thread runs."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _next(requests: deque[_Waiting], room: int) -> list[_Asked]:
    """Take what the next call asks: one question of each request in turn, while there is room for its placeholders."""
    batch: list[_Asked] = []
    while requests:
        waiting = requests[0]
        while waiting and not waiting[0].waits:
            waiting.popleft()
        if not waiting:
            requests.popleft()
            continue
        room -= waiting[0].question.num_placeholders
        if batch and room < 0:
            break
        asked = waiting.popleft()
        asked.sent = True
        batch.append(asked)
        requests.rotate(-1)
    return batch
