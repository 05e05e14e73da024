"""The engine core's half of a decision: requests for them are queued, and one batch is run after each step, so that
what is being generated goes on."""

from collections import deque
from concurrent.futures import Future
from typing import Any

from vllm import envs

from eadaprune_vllm.messages import REJECTED

_QUEUE = "_eadaprune_queue"


def decide(core: Any, payload: bytes) -> Any:
    """Utility of the engine core.

    Args:
        core: an engine core.
        payload: packed requests for decisions.

    Returns:
        The packed responses of rank 0; where the core has a loop a future of them, done once the engine is neither
        paused nor asleep; or ``REJECTED``.
    """
    from vllm.v1.engine.core import EngineCoreProc

    if not isinstance(core, EngineCoreProc):
        if core.model_executor.is_sleeping:
            raise RuntimeError("the engine is asleep; wake it up before it is sent images or videos")
        return _call_in_time(core, payload)
    if _rejects(core):
        return REJECTED
    future: Future[bytes] = Future()
    vars(core).setdefault(_QUEUE, deque()).append((payload, future))
    return future


def run_next(core: Any) -> bool:
    """Whether a batch was run."""
    queue = vars(core).get(_QUEUE)
    if not queue or (not _rejects(core) and (core.is_scheduler_paused() or core.model_executor.is_sleeping)):
        return False
    payload, future = queue.popleft()
    try:
        future.set_result(REJECTED if _rejects(core) else _call_in_time(core, payload))
    except TimeoutError:
        raise  # replies are left behind: the engine dies of it, as of a step, and tells all that wait
    except Exception as error:
        future.set_exception(error)
    return True


def _rejects(core: Any) -> bool:
    """Whether it rejects requests while it is paused, as releases from 0.33 do in some modes; or else they wait."""
    return bool(getattr(core, "reject_new_requests", False))


def _call_in_time(core: Any, payload: bytes) -> bytes:
    """What rank 0 returns, within the time that vLLM gives a step."""
    return call_workers(core, payload, envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS)


def call_workers(core: Any, payload: bytes, seconds: float | None = None) -> bytes:
    """What rank 0 returns, at once.

    Args:
        core: an engine core.
        payload: packed requests for decisions.
        seconds: how long all ranks may take. Where one fails in the encoder, others wait for it in a collective.

    Raises:
        TimeoutError: if they take longer; the executor is then of no use any more.
    """
    responses: bytes = core.model_executor.collective_rpc("eadaprune_decide", timeout=seconds, args=(payload,))[0]
    return responses
