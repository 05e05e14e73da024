"""The engine core's queue of decision requests. Before each step batches are launched, and those that are decided are
collected: decoding goes on meanwhile."""

import itertools
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from vllm import envs

from eadaprune_vllm.messages import REJECTED
from eadaprune_vllm.overlap import batches_in_flight

_QUEUE = "_eadaprune_queue"
_IDLE_SECONDS = 0.005  # an idle engine waits for a decision so long before it looks for new messages


@dataclass
class _Batch:
    """A batch of decision requests, of one call of the utility."""

    payload: bytes
    num_placeholders: int
    future: Future[bytes] = field(default_factory=Future)


@dataclass
class _Queue:
    """The batches of one engine core.

    Attributes:
        pending: not launched yet.
        launched: by number, in the order in which they were launched.
    """

    pending: deque[_Batch] = field(default_factory=deque)
    launched: dict[int, _Batch] = field(default_factory=dict)
    numbers: Any = field(default_factory=itertools.count)

    def launch(self, max_placeholders: int) -> list[tuple[int, bytes]]:
        """Take the batches that may be launched: together with those that are, within the profiled memory.

        Returns:
            Numbers and packed decision requests.
        """
        batches = []
        placeholders = sum(batch.num_placeholders for batch in self.launched.values())
        for _ in range(batches_in_flight() - len(self.launched)):
            if not self.pending:
                break
            placeholders += self.pending[0].num_placeholders
            if self.launched and placeholders > max_placeholders:
                break
            number, batch = next(self.numbers), self.pending.popleft()
            self.launched[number] = batch
            batches.append((number, batch.payload))
        return batches


def decide(core: Any, payload: bytes, num_placeholders: int) -> Any:
    """The utility call of the engine core.

    Args:
        core: vLLM's.
        payload: packed decision requests.
        num_placeholders: of all of them, without pruning.

    Returns:
        The packed responses of rank 0. A core in a process of its own returns a future of them, which is pending while
        the engine is paused or asleep; or ``REJECTED``.
    """
    from vllm.v1.engine.core import EngineCoreProc

    if not isinstance(core, EngineCoreProc):
        if core.model_executor.is_sleeping:
            raise RuntimeError("the engine is asleep; wake it up before you send images or videos")
        return call_workers(core, payload)
    if _rejects(core):
        return REJECTED
    batch = _Batch(payload, num_placeholders)
    _queue(core).pending.append(batch)
    return batch.future


def run_next(core: Any, timeout: float = 0.0) -> bool:
    """Launch the next batches, if the engine may, and respond to those that are decided.

    Args:
        core: vLLM's engine core.
        timeout: in seconds, how long to wait if nothing is decided yet.

    Returns:
        Whether there was anything to do.

    Raises:
        TimeoutError: if ranks hang; the executor still has replies of this call, and the engine dies, as it does if a
            step times out.
    """
    queue = _queue(core)
    if not queue.pending and not queue.launched:
        return False
    if _rejects(core):
        while queue.pending:
            queue.pending.popleft().future.set_result(REJECTED)
    may_launch = not (core.is_scheduler_paused() or core.model_executor.is_sleeping)
    max_placeholders = core.vllm_config.scheduler_config.max_num_encoder_input_tokens
    batches = queue.launch(max_placeholders) if may_launch else []
    if not queue.launched:
        return False
    try:
        decided = _call(core, batches, timeout)
    except TimeoutError:
        raise
    except Exception as error:  # of which batch is not known
        for lost in queue.launched.values():
            lost.future.set_exception(error)
        queue.launched.clear()
        return True
    for number, responses in decided:
        for earlier in [other for other in queue.launched if other < number]:
            queue.launched.pop(earlier).future.set_exception(RuntimeError("a batch of images was lost"))
        if found := queue.launched.pop(number, None):
            found.future.set_result(responses)
    return True


def run_idle(core: Any) -> None:
    """Run batches while the engine has no steps to make, until there are none or a message arrives."""
    while run_next(core, _IDLE_SECONDS) and core.input_queue.empty():
        pass


def call_workers(core: Any, payload: bytes) -> bytes:
    """Run a batch on all workers, and wait for its responses.

    Args:
        core: vLLM's engine core.
        payload: packed decision requests.

    Returns:
        The packed responses of rank 0.

    Raises:
        TimeoutError: if ranks take longer than vLLM's limit for a step.
    """
    ((_, responses),) = _call(core, [(-1, payload)], envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS)
    return responses


def _call(core: Any, batches: list[tuple[int, bytes]], timeout: float) -> list[tuple[int, bytes]]:
    """``eadaprune_decide`` of all workers. If one rank fails in the encoder, others hang in a collective."""
    limit = envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS
    decided: list[tuple[int, bytes]] = core.model_executor.collective_rpc(
        "eadaprune_decide", timeout=limit, args=(batches, timeout)
    )[0]
    return decided


def _queue(core: Any) -> _Queue:
    queue: _Queue = vars(core).setdefault(_QUEUE, _Queue())
    return queue


def _rejects(core: Any) -> bool:
    """Whether the engine rejects requests while it is paused, as from 0.33 in some modes. Otherwise they wait."""
    return bool(getattr(core, "reject_new_requests", False))
