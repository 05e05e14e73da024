"""The engine's side: the worker extension, and the core's queue of batches."""

import json
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Event, get_ident
from types import SimpleNamespace
from typing import Any

import pytest
from samples import decided, name_of, question
from vllm.utils.import_utils import resolve_obj_by_qualname

from eadaprune_vllm.engine import core as engine_core
from eadaprune_vllm.engine import worker
from eadaprune_vllm.engine.extension import OURS, extended
from eadaprune_vllm.engine.worker import DecidingWorker
from eadaprune_vllm.messages import (
    REJECTED,
    DecisionError,
    DecisionRequest,
    DecisionResponse,
    DecisionResult,
    pack,
    unpack_responses,
)


class Theirs:
    """A worker extension of an operator."""

    def method(self) -> str:
        return "theirs"


def test_the_extension_alone() -> None:
    assert extended("") == OURS
    assert resolve_obj_by_qualname(OURS) is DecidingWorker


def test_the_extension_together_with_an_operators() -> None:
    name = extended(f"{__name__}.Theirs")
    both = resolve_obj_by_qualname(name)
    assert issubclass(both, DecidingWorker)
    assert issubclass(both, Theirs)
    assert both().method() == "theirs"
    assert both.eadaprune_decide is DecidingWorker.eadaprune_decide
    assert resolve_obj_by_qualname(name) is both  # vLLM looks more than once


def test_the_extension_is_added_once() -> None:
    """Configurations are completed in every process, and the name travels."""
    for theirs in ("", f"{__name__}.Theirs"):
        once = extended(theirs)
        assert extended(once) == extended(extended(once)) == once


def test_extensions_of_two_operators_are_apart() -> None:
    for theirs in (json.JSONEncoder, json.JSONDecoder):
        both = resolve_obj_by_qualname(extended(f"json.{theirs.__name__}"))
        assert issubclass(both, theirs)
        assert issubclass(both, DecidingWorker)
    with pytest.raises(AttributeError):
        resolve_obj_by_qualname("eadaprune_vllm.engine.extension.nothing")


class Worker(DecidingWorker):
    """vLLM's, with our extension."""

    model_runner = "runner"


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Where this worker is among others."""
    found = SimpleNamespace(first_stage=True, rank=0)
    monkeypatch.setattr(worker, "get_pp_group", lambda: SimpleNamespace(is_first_rank=found.first_stage))
    monkeypatch.setattr(worker, "get_tensor_model_parallel_rank", lambda: found.rank)
    return found


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch, ranks: SimpleNamespace) -> list[list[int]]:
    """The batches that workers launched."""
    calls: list[list[int]] = []

    def launch(runner: Any, requests: list[DecisionRequest], respond: bool) -> Callable[[], list[DecisionResponse]]:
        assert runner == "runner"
        assert respond == (ranks.rank == 0)
        calls.append([name_of(each) for each in requests])
        return lambda: [decided(1 + name_of(each) % 4) for each in requests]

    monkeypatch.setattr(worker, "launch", launch)
    return calls


def batch(number: int, *names: int) -> tuple[int, bytes]:
    return number, pack([question(name=name) for name in names])


def sizes(payload: bytes) -> list[int]:
    """How many tokens each decision keeps."""
    return [len(answer.decision) for answer in unpack_responses(payload) if isinstance(answer, DecisionResult)]


def test_worker_responds_to_the_call_that_launched(ranks: SimpleNamespace, seen: list[list[int]]) -> None:
    ((number, payload),) = Worker().eadaprune_decide([batch(7, 2, 3)], 0)
    assert number == 7
    assert sizes(payload) == [3, 4]


def test_worker_on_a_gpu_responds_later(
    ranks: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, overlapping: None
) -> None:
    """In order, without blocking the engine's thread."""
    device = [Event(), Event()]  # by batch: set once the encoder is done
    decided_on: list[int] = []

    def launch(runner: Any, requests: list[DecisionRequest], respond: bool) -> Callable[[], list[DecisionResponse]]:
        (name,) = map(name_of, requests)

        def decide() -> list[DecisionResponse]:
            assert device[name].wait(30)
            decided_on.append(get_ident())
            return [decided(1 + name)]

        return decide

    monkeypatch.setattr(worker, "launch", launch)
    busy = Worker()
    assert busy.eadaprune_decide([batch(0, 0)], 0) == []
    assert busy.eadaprune_decide([batch(1, 1)], 0) == []
    assert busy.eadaprune_decide([], 0.001) == []
    device[0].set()
    ((number, payload),) = busy.eadaprune_decide([], 30)
    assert (number, sizes(payload)) == (0, [1])
    device[1].set()
    ((number, payload),) = busy.eadaprune_decide([], 30)
    assert (number, sizes(payload)) == (1, [2])
    assert busy.eadaprune_decide([], 30) == []
    assert get_ident() not in decided_on


@pytest.mark.parametrize("error", [ValueError("thirteen"), RuntimeError("CUDA"), KeyError("x"), AssertionError()])
@pytest.mark.parametrize("when", ["launch", "decide"])
def test_a_worker_never_raises(
    ranks: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, error: Exception, when: str
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(worker, "launch", fail if when == "launch" else lambda *_, **__: fail)
    ((_, payload),) = Worker().eadaprune_decide([batch(0, 1, 2)], 0)
    assert unpack_responses(payload) == [DecisionError(f"this image could not be encoded: {error}")] * 2
    ranks.rank = 1
    assert Worker().eadaprune_decide([batch(0, 1, 2)], 0) == []


def test_only_rank_0_of_the_first_stage_responds(ranks: SimpleNamespace, seen: list[list[int]]) -> None:
    ranks.rank = 1
    assert Worker().eadaprune_decide([batch(0, 5)], 0) == []
    assert seen == [[5]]
    ranks.first_stage = False
    assert Worker().eadaprune_decide([batch(0, 5)], 0) == []
    assert seen == [[5]]


def test_decisions_fail_during_weight_updates(ranks: SimpleNamespace, seen: list[list[int]]) -> None:
    busy = Worker()
    busy._weight_update_active = True  # type: ignore[attr-defined]
    ((_, payload),) = busy.eadaprune_decide([batch(0, 1)], 0)
    (found,) = unpack_responses(payload)
    assert isinstance(found, DecisionError)
    assert "weights are being updated" in found.error
    assert not seen


@pytest.fixture
def overlapping(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    for module in (worker, engine_core):
        monkeypatch.setattr(module, "batches_in_flight", lambda: 2)


class Core:
    """An engine core and its workers. On a GPU (``slow``) they respond to a batch once it is in ``ready``."""

    def __init__(self, slow: bool = False) -> None:
        self.paused = False
        self.model_executor = SimpleNamespace(is_sleeping=False, collective_rpc=self.collective_rpc)
        self.vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_encoder_input_tokens=100))
        self.input_queue: SimpleQueue[object] = SimpleQueue()
        self.slow, self.ready = slow, set[bytes]()
        self.launched: list[bytes] = []
        self.open: list[tuple[int, bytes]] = []
        self.calls = 0

    def is_scheduler_paused(self) -> bool:
        return self.paused

    def collective_rpc(
        self, method: str, timeout: float | None, args: tuple[list[tuple[int, bytes]], float]
    ) -> list[list[tuple[int, bytes]]]:
        assert method == "eadaprune_decide"
        assert timeout == 300  # vLLM's own, of a step
        self.calls += 1
        batches, _ = args
        for batch in batches:
            self.launched.append(batch[1])
            if batch[1] == b"bad":
                raise RuntimeError("a worker died")
            if batch[1] == b"hangs":
                raise TimeoutError("RPC call to eadaprune_decide timed out.")
            self.open.append(batch)
        found = []
        while self.open and (not self.slow or self.open[0][1] in self.ready):
            number, payload = self.open.pop(0)
            found.append((number, b"answer to " + payload))
        return [found, []]  # only rank 0 responds


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> Any:
    """One with a loop, in a process of its own."""
    monkeypatch.setattr("vllm.v1.engine.core.EngineCoreProc", Core)
    return Core()


@pytest.fixture
def gpu(core: Any, overlapping: None) -> Any:
    core.slow = True
    return core


def test_one_batch_runs_after_each_step(core: Any) -> None:
    futures: list[Future[bytes]] = [engine_core.decide(core, payload, 10) for payload in (b"1", b"2", b"3")]
    assert not any(future.done() for future in futures)
    for number in range(3):
        assert engine_core.run_next(core)
        assert [future.done() for future in futures] == [other <= number for other in range(3)]
    assert not engine_core.run_next(core)
    assert [future.result() for future in futures] == [b"answer to 1", b"answer to 2", b"answer to 3"]
    assert core.calls == 3


def test_on_a_gpu_two_batches_are_in_flight(gpu: Any) -> None:
    futures: list[Future[bytes]] = [engine_core.decide(gpu, payload, 10) for payload in (b"1", b"2", b"3")]
    assert engine_core.run_next(gpu)
    assert gpu.calls == 1
    assert engine_core.run_next(gpu)
    assert gpu.launched == [b"1", b"2"]
    assert not any(future.done() for future in futures)
    gpu.ready.add(b"1")
    assert engine_core.run_next(gpu)
    assert futures[0].result() == b"answer to 1"
    assert engine_core.run_next(gpu)
    assert gpu.launched == [b"1", b"2", b"3"]
    gpu.ready |= {b"2", b"3"}
    assert engine_core.run_next(gpu)
    assert [future.result() for future in futures] == [b"answer to 1", b"answer to 2", b"answer to 3"]
    calls = gpu.calls
    assert not engine_core.run_next(gpu)
    assert gpu.calls == calls


def test_batches_in_flight_stay_within_the_profiled_memory(gpu: Any) -> None:
    """Of 100 placeholders; a single item may have more."""
    for payload, size in ((b"1", 60), (b"2", 41), (b"3", 1000)):
        engine_core.decide(gpu, payload, size)
    engine_core.run_next(gpu)
    assert gpu.launched == [b"1"]
    gpu.ready.add(b"1")
    engine_core.run_next(gpu)
    engine_core.run_next(gpu)
    assert gpu.launched == [b"1", b"2"]
    gpu.ready.add(b"2")
    engine_core.run_next(gpu)
    engine_core.run_next(gpu)
    assert gpu.launched == [b"1", b"2", b"3"]


def test_an_idle_engine_waits_for_decisions_until_a_message_arrives(gpu: Any) -> None:
    future = engine_core.decide(gpu, b"1", 10)
    gpu.input_queue.put("a request")
    engine_core.run_idle(gpu)
    assert not future.done()
    gpu.input_queue.get()
    gpu.ready.add(b"1")
    engine_core.run_idle(gpu)
    assert future.result() == b"answer to 1"


def test_without_requests_nothing_runs(core: Any) -> None:
    assert not engine_core.run_next(core)
    assert not core.calls


@pytest.mark.parametrize("state", ["paused", "asleep"])
def test_decisions_wait_while_the_engine_is_paused_or_asleep(gpu: Any, state: str) -> None:
    """But what was launched before is responded to."""
    launched = engine_core.decide(gpu, b"1", 10)
    engine_core.run_next(gpu)
    pending = engine_core.decide(gpu, b"2", 10)

    def rest(rests: bool) -> None:
        gpu.paused = rests and state == "paused"
        gpu.model_executor.is_sleeping = rests and state == "asleep"

    rest(True)
    gpu.ready |= {b"1", b"2"}
    assert engine_core.run_next(gpu)
    assert launched.result() == b"answer to 1"
    assert not engine_core.run_next(gpu)
    assert not pending.done()
    rest(False)
    assert engine_core.run_next(gpu)
    assert pending.result() == b"answer to 2"


def test_engine_that_rejects_requests_rejects_decision_requests(gpu: Any) -> None:
    launched = engine_core.decide(gpu, b"0", 10)
    engine_core.run_next(gpu)
    waiting = engine_core.decide(gpu, b"1", 10)
    gpu.reject_new_requests = gpu.paused = True
    assert engine_core.decide(gpu, b"2", 10) == REJECTED
    gpu.ready |= {b"0", b"3"}
    assert engine_core.run_next(gpu)
    assert waiting.result() == REJECTED
    assert launched.result() == b"answer to 0"
    gpu.reject_new_requests = gpu.paused = False
    later = engine_core.decide(gpu, b"3", 10)
    assert engine_core.run_next(gpu)
    assert later.result() == b"answer to 3"


def test_error_reaches_the_caller(core: Any) -> None:
    bad, good = engine_core.decide(core, b"bad", 10), engine_core.decide(core, b"good", 10)
    assert engine_core.run_next(core)
    assert engine_core.run_next(core)
    with pytest.raises(RuntimeError, match="a worker died"):
        bad.result()
    assert good.result() == b"answer to good"


def test_a_lost_batch_fails_and_no_other(gpu: Any) -> None:
    lost, other = engine_core.decide(gpu, b"1", 10), engine_core.decide(gpu, b"2", 10)
    engine_core.run_next(gpu)
    engine_core.run_next(gpu)
    gpu.open.pop(0)
    gpu.open.insert(0, (99, b"unknown"))
    gpu.ready |= {b"unknown", b"2"}
    gpu.open.reverse()
    assert engine_core.run_next(gpu)
    with pytest.raises(RuntimeError, match="lost"):
        lost.result()
    assert other.result() == b"answer to 2"


def test_engine_dies_if_ranks_time_out(core: Any) -> None:
    """As of a step that takes too long. Its clients then fail all pending requests."""
    slow = engine_core.decide(core, b"hangs", 10)
    with pytest.raises(TimeoutError):
        engine_core.run_next(core)
    assert not slow.done()


def test_in_process_engine_that_sleeps_raises() -> None:
    """What encodes would read memory that is not there."""
    core = Core()
    core.model_executor.is_sleeping = True
    with pytest.raises(RuntimeError, match="the engine is asleep"):
        engine_core.decide(core, b"1", 10)


def test_in_process_engine_responds_at_once() -> None:
    assert engine_core.decide(Core(), b"1", 10) == b"answer to 1"
