"""The engine core: between its steps it answers what front ends ask, at most one question after each, so that requests
in progress go on."""

from collections import deque
from concurrent.futures import Future
from typing import Any

from vllm import envs

from eadaprune_vllm.messages import REFUSED

_WAITING = "_eadaprune_waiting"


def ask(core: Any, payload: bytes) -> Any:
    """Utility of the engine core: what rank 0 answers. Unless there is no loop that would come to it later, a promise
    of it, which is kept once the engine is neither paused nor asleep."""
    from vllm.v1.engine.core import EngineCoreProc

    if not isinstance(core, EngineCoreProc):
        if core.model_executor.is_sleeping:
            raise RuntimeError("the engine is asleep; wake it up before it is sent images or videos")
        return _ask_in_time(core, payload)
    if _refuses(core):
        return REFUSED
    promise: Future[bytes] = Future()
    vars(core).setdefault(_WAITING, deque()).append((payload, promise))
    return promise


def answer_next(core: Any) -> bool:
    """Whether a question was answered."""
    waiting = vars(core).get(_WAITING)
    if not waiting or (not _refuses(core) and (core.is_scheduler_paused() or core.model_executor.is_sleeping)):
        return False
    payload, promise = waiting.popleft()
    try:
        promise.set_result(REFUSED if _refuses(core) else _ask_in_time(core, payload))
    except TimeoutError:
        raise  # replies are left behind: the engine dies of it, as of a step, and tells all that wait
    except Exception as error:
        promise.set_exception(error)
    return True


def _refuses(core: Any) -> bool:
    """Whether it refuses requests while it is paused, and with them questions, as releases from 0.33 do in some modes;
    or else both wait."""
    return bool(getattr(core, "reject_new_requests", False))


def _ask_in_time(core: Any, payload: bytes) -> bytes:
    """What rank 0 answers, within the time that vLLM gives a step."""
    return ask_workers(core, payload, envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS)


def ask_workers(core: Any, payload: bytes, seconds: float | None = None) -> bytes:
    """What rank 0 answers, at once.

    Args:
        core: an engine core.
        payload: packed questions.
        seconds: how long all ranks may take. Where one fails in the encoder, others wait for it in a collective.

    Raises:
        TimeoutError: if they take longer; the executor is then of no use any more.
    """
    answer: bytes = core.model_executor.collective_rpc("eadaprune_decide", timeout=seconds, args=(payload,))[0]
    return answer
