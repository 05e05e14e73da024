"""The engine's side: the worker extension, and when the core answers."""

import json
from concurrent.futures import Future
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
    """What workers were asked to decide about."""
    calls: list[list[int]] = []

    def decide(runner: Any, requests: list[DecisionRequest], respond: bool) -> list[DecisionResponse]:
        assert runner == "runner"
        assert respond == (ranks.rank == 0)
        calls.append([name_of(each) for each in requests])
        if 13 in calls[-1]:
            raise ValueError("thirteen")
        return [decided(1 + name_of(each) % 4) for each in requests]

    monkeypatch.setattr(worker, "decide", decide)
    return calls


def test_worker_responds(ranks: SimpleNamespace, seen: list[list[int]]) -> None:
    found = unpack_responses(Worker().eadaprune_decide(pack([question(name=2), question(name=3)])))
    assert [len(answer.decision) for answer in found if isinstance(answer, DecisionResult)] == [3, 4]


@pytest.mark.parametrize("error", [ValueError("thirteen"), RuntimeError("CUDA"), KeyError("x"), AssertionError()])
def test_a_worker_never_raises(
    ranks: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    def decide(*_: Any, **__: Any) -> list[DecisionResponse]:
        raise error

    monkeypatch.setattr(worker, "decide", decide)
    payload = pack([question(), question()])
    found = unpack_responses(Worker().eadaprune_decide(payload))
    assert found == [DecisionError(f"this image could not be encoded: {error}")] * 2
    ranks.rank = 1
    assert Worker().eadaprune_decide(payload) == b""


def test_only_rank_0_of_the_first_stage_responds(ranks: SimpleNamespace, seen: list[list[int]]) -> None:
    payload = pack([question(name=5)])
    ranks.rank = 1
    assert Worker().eadaprune_decide(payload) == b""
    assert seen == [[5]]
    ranks.first_stage = False
    assert Worker().eadaprune_decide(payload) == b""
    assert seen == [[5]]


def test_decisions_fail_during_weight_updates(ranks: SimpleNamespace, seen: list[list[int]]) -> None:
    busy = Worker()
    busy._weight_update_active = True  # type: ignore[attr-defined]
    (found,) = unpack_responses(busy.eadaprune_decide(pack([question()])))
    assert isinstance(found, DecisionError)
    assert "weights are being updated" in found.error
    assert not seen


class Core:
    """An engine core, of which only rank 0 answers."""

    def __init__(self) -> None:
        self.paused = False
        self.model_executor = SimpleNamespace(is_sleeping=False, collective_rpc=self.collective_rpc)

    def is_scheduler_paused(self) -> bool:
        return self.paused

    def collective_rpc(self, method: str, timeout: float | None, args: tuple[bytes]) -> list[bytes]:
        assert method == "eadaprune_decide"
        (payload,) = args
        if payload == b"bad":
            raise RuntimeError("a worker died")
        if payload == b"slow":
            assert timeout == 300  # vLLM's own, of a step
            raise TimeoutError("RPC call to eadaprune_decide timed out.")
        return [b"answer to " + payload, b""]


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> Any:
    """One with a loop that comes to questions later."""
    monkeypatch.setattr("vllm.v1.engine.core.EngineCoreProc", Core)
    return Core()


def test_one_batch_runs_after_each_step(core: Any) -> None:
    promises: list[Future[bytes]] = [engine_core.decide(core, payload) for payload in (b"1", b"2", b"3")]
    assert not any(promise.done() for promise in promises)
    for number in range(3):
        assert engine_core.run_next(core)
        assert [promise.done() for promise in promises] == [other <= number for other in range(3)]
    assert not engine_core.run_next(core)
    assert [promise.result() for promise in promises] == [b"answer to 1", b"answer to 2", b"answer to 3"]


def test_without_requests_nothing_runs(core: Any) -> None:
    assert not engine_core.run_next(core)


@pytest.mark.parametrize("state", ["paused", "asleep"])
def test_decisions_wait_while_the_engine_is_paused_or_asleep(core: Any, state: str) -> None:
    promise = engine_core.decide(core, b"1")

    def rest(rests: bool) -> None:
        core.paused = rests and state == "paused"
        core.model_executor.is_sleeping = rests and state == "asleep"

    rest(True)
    assert not engine_core.run_next(core)
    assert not promise.done()
    rest(False)
    assert engine_core.run_next(core)
    assert promise.result() == b"answer to 1"


def test_engine_that_rejects_requests_rejects_decision_requests(core: Any) -> None:
    waiting = engine_core.decide(core, b"1")
    core.reject_new_requests = core.paused = True
    assert engine_core.decide(core, b"2") == REJECTED
    assert engine_core.run_next(core)
    assert waiting.result() == REJECTED
    core.reject_new_requests = core.paused = False
    later = engine_core.decide(core, b"3")
    assert engine_core.run_next(core)
    assert later.result() == b"answer to 3"


def test_error_reaches_the_caller(core: Any) -> None:
    bad, good = engine_core.decide(core, b"bad"), engine_core.decide(core, b"good")
    assert engine_core.run_next(core)
    assert engine_core.run_next(core)
    with pytest.raises(RuntimeError, match="a worker died"):
        bad.result()
    assert good.result() == b"answer to good"


def test_engine_dies_if_ranks_time_out(core: Any) -> None:
    """As of a step that takes too long. Its clients then tell those who wait."""
    slow = engine_core.decide(core, b"slow")
    with pytest.raises(TimeoutError):
        engine_core.run_next(core)
    assert not slow.done()


def test_in_process_engine_that_sleeps_raises() -> None:
    """What encodes would read memory that is not there."""
    core = Core()
    core.model_executor.is_sleeping = True
    with pytest.raises(RuntimeError, match="the engine is asleep"):
        engine_core.decide(core, b"1")


def test_in_process_engine_responds_at_once() -> None:
    assert engine_core.decide(Core(), b"1") == b"answer to 1"
