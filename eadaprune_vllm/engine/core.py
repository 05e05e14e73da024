"""The engine core's queue of decision requests. One batch runs after each step, so that decoding goes on."""

from collections import deque
from concurrent.futures import Future
from typing import Any

from vllm import envs

from eadaprune_vllm.messages import REJECTED

_QUEUE = "_eadaprune_queue"


def decide(core: Any, payload: bytes) -> Any:
    """The utility call of the engine core.

    Args:
        core: vLLM's.
        payload: packed decision requests.

    Returns:
        The packed responses of rank 0. A core in a process of its own returns a future of them, which is pending while
        the engine is paused or asleep; or ``REJECTED``.
    """
    from vllm.v1.engine.core import EngineCoreProc

    if not isinstance(core, EngineCoreProc):
        if core.model_executor.is_sleeping:
            raise RuntimeError("the engine is asleep; wake it up before you send images or videos")
        return _call_within_step_timeout(core, payload)
    if _rejects(core):
        return REJECTED
    future: Future[bytes] = Future()
    vars(core).setdefault(_QUEUE, deque()).append((payload, future))
    return future


def run_next(core: Any) -> bool:
    """Run the next batch, if there is one and the engine may run it.

    Returns:
        Whether a batch was run.
    """
    queue = vars(core).get(_QUEUE)
    if not queue or (not _rejects(core) and (core.is_scheduler_paused() or core.model_executor.is_sleeping)):
        return False
    payload, future = queue.popleft()
    try:
        future.set_result(REJECTED if _rejects(core) else _call_within_step_timeout(core, payload))
    except TimeoutError:
        raise  # the executor still has replies of this call: the engine dies, as it does if a step times out
    except Exception as error:
        future.set_exception(error)
    return True


def _rejects(core: Any) -> bool:
    """Whether the engine rejects requests while it is paused, as from 0.33 in some modes. Otherwise they wait."""
    return bool(getattr(core, "reject_new_requests", False))


def _call_within_step_timeout(core: Any, payload: bytes) -> bytes:
    return call_workers(core, payload, envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS)


def call_workers(core: Any, payload: bytes, timeout: float | None = None) -> bytes:
    """Run a batch on all workers.

    Args:
        core: vLLM's engine core.
        payload: packed decision requests.
        timeout: for all ranks, in seconds. If one rank fails in the encoder, others hang in a collective.

    Returns:
        The packed responses of rank 0.

    Raises:
        TimeoutError: after the timeout; the executor is unusable then.
    """
    responses: bytes = core.model_executor.collective_rpc("eadaprune_decide", timeout=timeout, args=(payload,))[0]
    return responses
