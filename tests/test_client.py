"""Asking the engine: who waits for whom, and what travels together."""

import asyncio
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from samples import decided, name_of, question

from eadaprune_vllm.frontend import client, engine_client
from eadaprune_vllm.frontend.client import DecisionClient
from eadaprune_vllm.frontend.engine_client import AsyncEngines
from eadaprune_vllm.messages import (
    REJECTED,
    DecisionError,
    DecisionResponse,
    DecisionResult,
    pack,
    unpack_requests,
    unpack_responses,
)
from eadaprune_vllm.patches.engine_client import _locked


class Engine:
    """An engine client of vLLM's that does not block. It answers with the names of the images as rows, and counts.
    Calls with one of ``fails`` fail, and so do images of ``refuses``, alone."""

    def __init__(self) -> None:
        self.core_engines = [b"first"]
        self.client_index = 0
        self.resources = SimpleNamespace(engine_dead=False)
        self.calls: list[list[int]] = []
        self.at_once = self.most_at_once = 0
        self.held = asyncio.Event()
        self.held.set()
        self.fails: set[int] = set()
        self.refuses: set[int] = set()

    async def _call_utility_async(self, method: str, payload: bytes, num_placeholders: int, engine: bytes) -> bytes:
        assert method == "eadaprune_decide"
        asked = [name_of(each) for each in unpack_requests(payload)]
        self.calls.append(asked)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await self.held.wait()
        self.at_once -= 1
        if self.fails & {*asked}:
            raise RuntimeError("the call failed")
        return pack([DecisionError("it failed") if name in self.refuses else named(name) for name in asked])


def named(name: int) -> DecisionResponse:
    return decided(rows=torch.full((2, 1), name))


def names(answers: list[DecisionResponse]) -> list[int]:
    return [int(answer.embeds[0]) for answer in answers if isinstance(answer, DecisionResult)]


def asked(
    decision_client: DecisionClient, first: int, count: int, tokens: int = 4
) -> "asyncio.Task[list[DecisionResponse]]":
    """A request of so many images, whose names go up from ``first``."""
    return asyncio.create_task(
        decision_client.decide([question(tokens, name=first + number) for number in range(count)])
    )


async def settle(engine: Engine, decision_client: DecisionClient) -> None:
    """Until all requests have entered their questions, and all that can be asked has reached the engine."""
    for _ in range(3):
        await asyncio.sleep(0)
    while sum(not task.done() for task in decision_client._senders) != engine.at_once:
        await asyncio.sleep(0.001)


def run(test: Callable[[Engine, DecisionClient], Awaitable[None]], most: int = 16) -> None:
    """Four images of the default size are a call."""

    async def connected() -> None:
        engine, decision_client = Engine(), DecisionClient(most)
        decision_client.connect(engine)
        await asyncio.wait_for(test(engine, decision_client), 30)

    asyncio.run(connected())


def test_responses_are_matched_to_requests() -> None:
    async def test(engine: Engine, decision_client: DecisionClient) -> None:
        found = await asyncio.gather(*(asked(decision_client, 100 * number, 7) for number in range(9)))
        assert [names(each) for each in found] == [list(range(100 * number, 100 * number + 7)) for number in range(9)]
        answered = Counter(name for each in found for name in names(each))
        assert Counter(name for call in engine.calls for name in call) == answered

    run(test)


def test_pending_requests_are_batched_one_call_at_a_time() -> None:
    async def test(engine: Engine, decision_client: DecisionClient) -> None:
        engine.held.clear()
        tasks = [asked(decision_client, 0, 1)]
        await settle(engine, decision_client)
        tasks += [asked(decision_client, number, 1) for number in (1, 2, 3)]
        await settle(engine, decision_client)
        assert engine.calls == [[0]]
        engine.held.set()
        await asyncio.gather(*tasks)
        assert engine.calls == [[0], [1, 2, 3]]
        assert engine.most_at_once == 1

    run(test)


def test_on_a_gpu_two_batches_are_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of at most half of the placeholders."""
    for module in (client, engine_client):
        monkeypatch.setattr(module, "batches_in_flight", lambda: 2)

    async def test(engine: Engine, decision_client: DecisionClient) -> None:
        engine.held.clear()
        tasks = []
        for number in range(4):
            tasks.append(asked(decision_client, 10 * number, 3))
            await settle(engine, decision_client)
        assert engine.calls == [[0, 1], [2, 10]]
        engine.held.set()
        assert [names(each) for each in await asyncio.gather(*tasks)] == [
            [10 * number + index for index in range(3)] for number in range(4)
        ]
        assert engine.most_at_once == 2

    run(test)


def test_batches_stay_within_the_profiled_encoder_budget() -> None:
    """Unless one image alone is more."""

    async def test(engine: Engine, decision_client: DecisionClient) -> None:
        sizes = [10, 6, 1, 40, 16, 5, 5, 5, 5]
        await decision_client.decide([question(size, name=number) for number, size in enumerate(sizes)])
        assert engine.calls == [[0, 1], [2], [3], [4], [5, 6, 7], [8]]

    run(test)


def test_a_large_request_does_not_hold_up_a_small_one() -> None:
    async def test(engine: Engine, decision_client: DecisionClient) -> None:
        engine.held.clear()
        large = asked(decision_client, 0, 200)
        await settle(engine, decision_client)
        small = asked(decision_client, 1000, 1)
        await settle(engine, decision_client)
        assert len(engine.calls) == 1
        engine.held.set()
        assert names(await small) == [1000]
        assert len(engine.calls) <= 3  # the one in progress, its own, and one that may have begun since
        assert 1000 in engine.calls[1]
        assert names(await large) == list(range(200))

    run(test)


def test_requests_take_turns() -> None:
    async def test(engine: Engine, decision_client: DecisionClient) -> None:
        engine.held.clear()
        tasks = [asked(decision_client, 900, 1)]
        await settle(engine, decision_client)
        tasks += [asked(decision_client, first, 4) for first in (0, 100, 200)]
        await settle(engine, decision_client)
        engine.held.set()
        await asyncio.gather(*tasks)
        assert engine.calls == [[900], [0, 100, 200, 1], [101, 201, 2, 102], [202, 3, 103, 203]]

    run(test)


def test_cancelled_decisions_are_not_sent() -> None:
    async def test(engine: Engine, decision_client: DecisionClient) -> None:
        engine.held.clear()
        tasks = [asked(decision_client, first, 6) for first in (0, 100, 200)]
        await settle(engine, decision_client)
        tasks[1].cancel()
        await settle(engine, decision_client)
        engine.held.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(found[1], asyncio.CancelledError)
        assert [names(each) for each in found[::2] if isinstance(each, list)] == [[*range(6)], [*range(200, 206)]]
        sent = {name for call in engine.calls[1:] for name in call}
        assert not {name for name in sent if 100 <= name < 200}

    run(test)


def test_cancelled_requests_leave_nothing_behind() -> None:
    async def test(engine: Engine, decision_client: DecisionClient) -> None:
        engine.held.clear()
        tasks = [asked(decision_client, 0, 1)]
        await settle(engine, decision_client)
        tasks += [asked(decision_client, number, 3) for number in range(1, 500)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        engine.held.set()
        await settle(engine, decision_client)
        assert engine.calls == [[0]]
        assert not decision_client._queues
        assert not decision_client._pending
        assert names(await asked(decision_client, 7, 2)) == [7, 8]

    run(test)


@pytest.mark.parametrize("sent", [False, True])
def test_shared_decision_is_requested_once(sent: bool) -> None:
    """Before and while it is asked; afterwards it is asked anew. Whoever gives up leaves it to the others."""

    async def test(engine: Engine, decision_client: DecisionClient) -> None:
        engine.held.clear()
        shared, own = question(name=1), question(name=2)
        if not sent:
            others = asked(decision_client, 900, 4)
            await settle(engine, decision_client)
        tasks = [asyncio.create_task(decision_client.decide([shared])) for _ in range(3)]
        await settle(engine, decision_client)
        tasks.append(asyncio.create_task(decision_client.decide([own, shared])))
        await settle(engine, decision_client)
        tasks[0].cancel()
        await settle(engine, decision_client)
        engine.held.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(found[0], asyncio.CancelledError)
        assert [names(each) for each in found[1:] if isinstance(each, list)] == [[1], [1], [2, 1]]
        if not sent:
            await others
        assert Counter(name for call in engine.calls for name in call)[1] == 1
        assert names(await decision_client.decide([shared])) == [1]
        assert Counter(name for call in engine.calls for name in call)[1] == 2
        assert not decision_client._pending

    run(test)


def test_shared_decision_fails_for_all_callers() -> None:
    async def test(engine: Engine, decision_client: DecisionClient) -> None:
        engine.held.clear()
        engine.fails = {1}
        shared = question(name=1)
        tasks = [asyncio.create_task(decision_client.decide([shared])) for _ in range(3)]
        await settle(engine, decision_client)
        engine.held.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [str(each) for each in found] == ["the call failed"] * 3
        assert engine.calls == [[1]]

    run(test)


def test_error_of_a_batch_reaches_all_its_callers() -> None:
    async def test(engine: Engine, decision_client: DecisionClient) -> None:
        engine.held.clear()
        first = asked(decision_client, 900, 1)
        await settle(engine, decision_client)
        engine.fails = {1}
        tasks = [asked(decision_client, first, 1) for first in (0, 1, 2, 3, 4, 5)]
        await settle(engine, decision_client)
        engine.held.set()
        assert names(await first) == [900]
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert engine.calls == [[900], [0, 1, 2, 3], [4, 5]]
        assert [str(each) for each in found[:4]] == ["the call failed"] * 4
        assert [names(each) for each in found[4:] if isinstance(each, list)] == [[4], [5]]
        assert names(await asked(decision_client, 6, 1)) == [6]

    run(test)


def test_other_threads_may_block() -> None:
    """While the loop goes on with others."""

    async def test(engine: Engine, decision_client: DecisionClient) -> None:
        engine.held.clear()
        waiting = asyncio.create_task(
            asyncio.to_thread(decision_client.decide_sync, [question(name=1), question(name=2)])
        )
        others = asked(decision_client, 10, 1)
        await settle(engine, decision_client)
        engine.held.set()
        assert names(await waiting) == [1, 2]
        assert names(await others) == [10]

    run(test)


def test_a_client_may_be_connected_before_there_is_a_loop() -> None:
    decision_client = DecisionClient(16)
    engine = asyncio.run(asyncio.to_thread(Engine))  # in a thread without one
    decision_client.connect(engine)
    assert asyncio.run(asyncio.wait_for(decision_client.decide([question(name=3)]), 30))


@pytest.mark.parametrize("in_process", [True, False])
def test_blocking_client_sends_batches(in_process: bool) -> None:
    calls: list[list[int]] = []

    def answer(payload: bytes, num_placeholders: int) -> bytes:
        calls.append([name_of(each) for each in unpack_requests(payload)])
        return pack([named(name) for name in calls[-1]])

    def call_utility(method: str, payload: bytes, num_placeholders: int) -> bytes:
        assert method == "eadaprune_decide"
        return answer(payload, num_placeholders)

    core = SimpleNamespace(eadaprune_decide=answer)
    decision_client = DecisionClient(16)
    decision_client.connect(
        SimpleNamespace(engine_core=core) if in_process else SimpleNamespace(call_utility=call_utility)
    )
    found = decision_client.decide_sync([question(7, name=number) for number in range(5)])
    assert names(found) == [0, 1, 2, 3, 4]
    assert calls == [[0, 1], [2, 3], [4]]
    assert decision_client.decide_sync([]) == []


def test_engines_are_called_in_turn() -> None:
    asked: list[bytes] = []

    async def call(method: str, payload: bytes, num_placeholders: int, engine: bytes) -> bytes:
        asked.append(engine)
        return payload

    async def test() -> None:
        client = Engine()
        client.core_engines = [b"a", b"b", b"c"]
        client._call_utility_async = call  # type: ignore[method-assign]
        engines = AsyncEngines(client)
        assert [await engines(payload, 4) for payload in (b"1", b"2", b"3", b"4")] == [b"1", b"2", b"3", b"4"]

        client.client_index = 2  # front ends do not all begin with the same
        assert await AsyncEngines(client)(b"5", 4) == b"5"

    asyncio.run(test())
    assert asked == [b"a", b"b", b"c", b"a", b"c"]


def test_idle_engine_is_called_first() -> None:
    """One call at a time to each."""

    async def test(engine: Engine, decision_client: DecisionClient) -> None:
        engine.core_engines = [b"a", b"b"]
        used: list[bytes] = []
        call = engine._call_utility_async

        async def noted(method: str, payload: bytes, num_placeholders: int, engine: bytes) -> bytes:
            used.append(engine)
            return await call(method, payload, num_placeholders, engine)

        engine._call_utility_async = noted  # type: ignore[method-assign]
        engine.held.clear()
        tasks = []
        for number in range(4):
            tasks.append(asked(decision_client, 10 * number, 1))
            await settle(engine, decision_client)
        assert used == [b"a", b"b"]
        engine.held.set()
        assert [names(await task) for task in tasks] == [[0], [10], [20], [30]]
        assert engine.calls == [[0], [10], [20, 30]]
        assert engine.most_at_once == 2

    run(test)


def test_an_engine_in_this_process_encodes_nothing_while_it_makes_a_step() -> None:
    """Whatever thread asks."""
    from vllm.v1.engine.core_client import InprocClient

    client = object.__new__(InprocClient)
    began, ends = threading.Event(), threading.Event()

    def step() -> Any:
        began.set()
        assert ends.wait(10)
        return {}, False

    def answer(payload: bytes, num_placeholders: int) -> bytes:
        return payload

    client.engine_core = SimpleNamespace(step_fn=step, post_step=lambda model_executed: None, eadaprune_decide=answer)
    ask = engine_client.blocking_call(client)
    assert ask
    with ThreadPoolExecutor(2) as pool:
        stepping = pool.submit(_locked, InprocClient.get_output, client)
        assert began.wait(10)
        asking = pool.submit(ask, b"1", 4)
        with pytest.raises(TimeoutError):
            asking.result(0.2)
        ends.set()
        assert asking.result() == b"1"
        stepping.result()


def test_pending_decisions_fail_if_the_engine_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine.exceptions import EngineDeadError

    monkeypatch.setattr(engine_client, "_WATCH_SECONDS", 0.05)

    async def test(engine: Engine, decision_client: DecisionClient) -> None:
        engine.held.clear()
        task = asked(decision_client, 0, 2)
        await settle(engine, decision_client)
        engine.resources.engine_dead = True
        with pytest.raises(EngineDeadError):
            await task

    run(test)


def test_removed_engine_blocks_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two, the one that is gone never answers; who waits for it is told, and later requests go to the other."""
    from vllm.exceptions import RetryableRequestError

    monkeypatch.setattr(engine_client, "_WATCH_SECONDS", 0.01)

    async def test(engine: Engine, decision_client: DecisionClient) -> None:
        engine.core_engines = [b"stays", b"goes"]
        call = engine._call_utility_async

        async def answer(method: str, payload: bytes, num_placeholders: int, engine: bytes) -> bytes:
            if engine == b"goes":
                lost.set()
                await asyncio.Event().wait()
            return await call(method, payload, num_placeholders, engine)

        engine._call_utility_async = answer  # type: ignore[method-assign]
        lost = asyncio.Event()
        engine.held.clear()
        tasks = [asked(decision_client, 0, 1)]
        await settle(engine, decision_client)
        tasks.append(asked(decision_client, 10, 1))
        await lost.wait()
        engine.core_engines = [b"stays"]
        with pytest.raises(RetryableRequestError, match="scaled down"):
            await tasks[1]
        engine.held.set()
        tasks[1:] = [asked(decision_client, number, 2) for number in range(20, 80, 10)]
        assert [names(await task)[0] for task in tasks] == [0, *range(20, 80, 10)]

    run(test)


def test_after_an_error_the_rest_of_the_request_is_not_sent() -> None:
    """Neither where the call fails, nor where the engine answers that an image cannot be encoded. What another request
    asks too, is."""

    async def test(engine: Engine, decision_client: DecisionClient) -> None:
        for first, fails, refuses in ((0, {2}, set[int]()), (100, set[int](), {102})):
            engine.calls.clear()
            engine.fails, engine.refuses = fails, refuses
            shared = question(4, name=first + 20)
            engine.held.clear()
            failing = asyncio.create_task(
                decision_client.decide([*(question(4, name=first + number) for number in range(20)), shared])
            )
            await settle(engine, decision_client)
            other = asyncio.create_task(decision_client.decide([shared]))
            await settle(engine, decision_client)
            engine.held.set()
            assert names(await other) == [first + 20]
            if fails:
                with pytest.raises(RuntimeError, match="the call failed"):
                    await failing
            else:
                *before, failed = await failing
                assert names(before) == [first, first + 1]
                assert isinstance(failed, DecisionError)
            assert engine.calls == [[first, first + 1, first + 2, first + 3], [first + 20]]

    run(test)


def test_blocking_on_the_event_loop_raises() -> None:
    async def test(engine: Engine, decision_client: DecisionClient) -> None:
        with pytest.raises(RuntimeError, match="render_cmpl_async"):
            decision_client.decide_sync([question()])
        assert not engine.calls

    run(test)


class Client:
    """An engine client of vLLM's that blocks, and whose engine dies before it answers."""

    def __init__(self) -> None:
        self.asked = threading.Event()

    def call_utility(self, method: str, payload: bytes, num_placeholders: int) -> bytes:
        self.asked.set()
        threading.Event().wait()
        raise AssertionError

    def ensure_alive(self) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        assert self.asked.wait(10)
        raise EngineDeadError


def test_blocking_call_raises_if_the_engine_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine.exceptions import EngineDeadError

    monkeypatch.setattr(engine_client, "_WATCH_SECONDS", 0.01)
    decision_client = DecisionClient(16)
    decision_client.connect(Client())
    with pytest.raises(EngineDeadError):
        decision_client.decide_sync([question()])


def test_rejecting_engine_leads_to_a_retryable_error() -> None:
    from vllm.exceptions import RetryableRequestError

    async def refuse(*_: Any, **__: Any) -> bytes:
        return REJECTED

    async def test(engine: Engine, decision_client: DecisionClient) -> None:
        engine._call_utility_async = refuse  # type: ignore[method-assign]
        with pytest.raises(RetryableRequestError, match="paused"):
            await asked(decision_client, 0, 1)

    run(test)


def test_responses_are_unpacked_off_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that other requests go on meanwhile: they may be large."""
    threads: set[int] = set()
    original = unpack_responses

    def noted(data: bytes) -> list[DecisionResponse]:
        threads.add(threading.get_ident())
        return original(data)

    monkeypatch.setattr("eadaprune_vllm.frontend.client.unpack_responses", noted)

    async def test(engine: Engine, decision_client: DecisionClient) -> None:
        await asked(decision_client, 0, 3)
        assert threads
        assert threading.get_ident() not in threads

    run(test)
