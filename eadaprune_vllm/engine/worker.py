"""The worker extension: a method of vLLM's workers that decides about images and videos."""

import logging

from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank

from eadaprune_vllm.engine.decide import decide
from eadaprune_vllm.messages import DecisionError, DecisionRequest, pack, unpack_requests

logger = logging.getLogger("vllm." + __name__)


class DecidingWorker:
    """Mixin that vLLM adds to its worker class (``worker_extension_cls``)."""

    def eadaprune_decide(self, payload: bytes) -> bytes:
        """Encode and decide. All ranks must be called with the same payload.

        Never raises: if one worker raises in a collective call, replies of other ranks stay in the queue, and later
        calls would read them as theirs.

        Args:
            payload: packed decision requests.

        Returns:
            Packed responses from rank 0 of the first pipeline stage; nothing from other ranks.
        """
        if not get_pp_group().is_first_rank:
            return b""
        is_rank_0 = get_tensor_model_parallel_rank() == 0
        requests = list[DecisionRequest]()
        try:
            requests = unpack_requests(payload)
            if getattr(self, "_weight_update_active", False):
                raise RuntimeError("the model's weights are being updated")
            responses = pack(decide(self.model_runner, requests, respond=is_rank_0))  # type: ignore[attr-defined]
        except Exception as error:
            logger.exception("Images could not be encoded")
            responses = pack([DecisionError(f"this image could not be encoded: {error}") for _ in requests])
        return responses if is_rank_0 else b""
