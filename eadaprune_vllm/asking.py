"""Asking the engine what to keep: questions of all requests that wait travel together, one call at a time."""

import asyncio
import concurrent.futures
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

from eadaprune_vllm.seams.engine import AsyncEngines, blocking
from eadaprune_vllm.wire import Answer, Question, answers, pack

Promise = asyncio.Future[Answer] | concurrent.futures.Future[Answer]
_Waiting = deque[tuple[Question, Promise]]


class Asker:
    """Of one front end.

    Args:
        most: placeholders of one call, unless a single image or video has more. vLLM measures the encoder's memory
            with so many.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._ask: Callable[[bytes], bytes] | None = None
        self._ask_async: Callable[[bytes], Awaitable[bytes]] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._requests: deque[_Waiting] = deque()
        self._task: asyncio.Task[None] | None = None

    def connect(self, client: Any) -> None:
        """Ask by this engine client of vLLM's."""
        self._ask = blocking(client)
        if not self._ask:
            self._ask_async = AsyncEngines(client)
            with suppress(RuntimeError):  # or else it is known with the first question
                self._loop = asyncio.get_running_loop()

    async def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """The answers to the questions of one request. They wait their turn: of every request one, and again. What is
        cancelled is not asked.

        Raises:
            EngineDeadError: if the engine dies.
        """
        self._loop = asyncio.get_running_loop()
        promises = [self._loop.create_future() for _ in questions]
        self._requests.append(deque(zip(questions, promises, strict=True)))
        if not self._task or self._task.done():
            self._task = asyncio.create_task(self._run())
        found: list[Answer] = await asyncio.gather(*promises)
        return found

    def ask_and_wait(self, questions: Sequence[Question]) -> list[Answer]:
        """The same from a thread that may wait."""
        if self._loop:
            return asyncio.run_coroutine_threadsafe(self.ask(questions), self._loop).result()
        assert self._ask, "images and videos come after the engine"
        found: list[Answer] = []
        waiting: _Waiting = deque((question, concurrent.futures.Future()) for question in questions)
        while batch := _next(deque([waiting]), self.most):
            found += answers(self._ask(pack([question for question, _ in batch])))
        return found

    async def _run(self) -> None:
        assert self._ask_async, "images and videos come after the engine"
        while batch := _next(self._requests, self.most):
            questions, promises = zip(*batch, strict=True)
            try:
                payload = await asyncio.to_thread(pack, questions)
                found = await asyncio.to_thread(answers, await self._ask_async(payload))
            except Exception as error:
                for promise in promises:
                    if not promise.done():
                        promise.set_exception(error)
                continue
            for promise, answer in zip(promises, found, strict=True):
                if not promise.done():
                    promise.set_result(answer)


def _next(requests: deque[_Waiting], room: int) -> list[tuple[Question, Promise]]:
    """Take what the next call asks: one question of each request in turn, while there is room for its placeholders."""
    batch: list[tuple[Question, Promise]] = []
    while requests:
        waiting = requests[0]
        while waiting and waiting[0][1].done():  # cancelled
            waiting.popleft()
        if not waiting:
            requests.popleft()
            continue
        room -= waiting[0][0].num_placeholders
        if batch and room < 0:
            break
        batch.append(waiting.popleft())
        requests.rotate(-1)
    return batch
