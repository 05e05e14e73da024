"""Asking the engine what to keep: questions of all requests that wait travel together, one call at a time."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from eadaprune_vllm.seams.engine import AsyncEngines, blocking
from eadaprune_vllm.wire import Answer, Question, answers, pack

_Waiting = deque[tuple[Question, asyncio.Future[Answer]]]


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
        return [answer for some in _batches(questions, self.most) for answer in answers(self._ask(pack(some)))]

    async def _run(self) -> None:
        assert self._ask_async, "images and videos come after the engine"
        while batch := self._next():
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

    def _next(self) -> list[tuple[Question, asyncio.Future[Answer]]]:
        """What the next call asks: one question of each request in turn, while there is room."""
        batch: list[tuple[Question, asyncio.Future[Answer]]] = []
        room = self.most
        while self._requests:
            waiting = self._requests[0]
            while waiting and waiting[0][1].done():  # cancelled
                waiting.popleft()
            if not waiting:
                self._requests.popleft()
                continue
            room -= waiting[0][0].num_placeholders
            if batch and room < 0:
                break
            batch.append(waiting.popleft())
            self._requests.rotate(-1)
        return batch


def _batches(questions: Sequence[Question], most: int) -> Iterator[list[Question]]:
    """The questions in order, so many placeholders at a time."""
    batch: list[Question] = []
    for question in questions:
        if batch and sum(other.num_placeholders for other in [*batch, question]) > most:
            yield batch
            batch = []
        batch.append(question)
    if batch:
        yield batch
