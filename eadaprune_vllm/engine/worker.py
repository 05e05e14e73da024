"""The worker extension: a method of vLLM's workers that decides about images and videos."""

import functools
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank

from eadaprune_vllm.engine.decide import launch
from eadaprune_vllm.messages import DecisionError, DecisionRequest, pack, unpack_requests
from eadaprune_vllm.overlap import batches_in_flight

logger = logging.getLogger("vllm." + __name__)
Batch = tuple[int, bytes]


class DecidingWorker:
    """Mixin that vLLM adds to its worker class (``worker_extension_cls``)."""

    def eadaprune_decide(self, batches: Sequence[Batch], timeout: float) -> list[Batch]:
        """Launch batches, and return those that are decided. All ranks must be called with the same arguments.

        Never raises: if one worker raises in a collective call, replies of other ranks stay in the queue, and later
        calls would read them as theirs.

        Args:
            batches: numbers and packed decision requests; none, to collect only.
            timeout: in seconds, how long to wait if nothing is decided yet.

        Returns:
            Numbers and packed responses, in the order in which batches were launched; from rank 0 of the first pipeline
            stage only.
        """
        if not get_pp_group().is_first_rank:
            return []
        is_rank_0 = get_tensor_model_parallel_rank() == 0
        pending: deque[tuple[int, Future[bytes]]] = vars(self).setdefault("_eadaprune_pending", deque())
        for number, payload in batches:
            decide = self._eadaprune_launch(payload, is_rank_0)
            if is_rank_0:
                pending.append((number, self._eadaprune_start(decide)))
        if pending and timeout:
            wait([pending[0][1]], timeout)
        decided: list[Batch] = []
        while pending and pending[0][1].done():
            number, future = pending.popleft()
            decided.append((number, future.result()))
        return decided

    def _eadaprune_launch(self, payload: bytes, is_rank_0: bool) -> Callable[[], bytes]:
        """Launch the encoder; returns what makes the packed responses, on any thread."""
        requests = list[DecisionRequest]()

        def failed(error: Exception) -> bytes:
            logger.exception("Images could not be encoded")
            return pack([DecisionError(f"this image could not be encoded: {error}") for _ in requests])

        try:
            requests = unpack_requests(payload)
            if getattr(self, "_weight_update_active", False):
                raise RuntimeError("the model's weights are being updated")
            launched = launch(self.model_runner, requests, respond=is_rank_0)  # type: ignore[attr-defined]
        except Exception as error:
            responses = failed(error)
            return lambda: responses

        def decide() -> bytes:
            try:
                return pack(launched())
            except Exception as error:
                return failed(error)

        return decide

    def _eadaprune_start(self, decide: Callable[[], bytes]) -> Future[bytes]:
        """Run it: on a thread if the device works while the host goes on, or else now."""
        if batches_in_flight() > 1:
            return _pool().submit(decide)
        future: Future[bytes] = Future()
        future.set_result(decide())
        return future


@functools.cache
def _pool() -> ThreadPoolExecutor:
    """The thread of this worker's decisions."""
    return ThreadPoolExecutor(1, "eadaprune")
