"""The worker extension: vLLM's worker decides about images and videos."""

import logging

from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank

from eadaprune_vllm.engine.decide import decide
from eadaprune_vllm.messages import DecisionError, DecisionRequest, pack, unpack_requests

logger = logging.getLogger("vllm." + __name__)


class DecidingWorker:
    """Mixin that vLLM adds to its worker class (``worker_extension_cls``)."""

    def eadaprune_decide(self, payload: bytes) -> bytes:
        """Encode and decide; every rank of the first pipeline stage must be asked the same.

        Never raises: what a worker raises in a collective call leaves replies of other ranks behind, which later calls
        would read as theirs.

        Args:
            payload: packed requests for decisions.

        Returns:
            Packed answers, from rank 0; nothing from others.
        """
        if not get_pp_group().is_first_rank:
            return b""
        answers = get_tensor_model_parallel_rank() == 0
        asked = list[DecisionRequest]()
        try:
            asked = unpack_requests(payload)
            if getattr(self, "_weight_update_active", False):
                raise RuntimeError("the model's weights are being updated")
            packed = pack(decide(self.model_runner, asked, answers))  # type: ignore[attr-defined]
        except Exception as error:
            logger.exception("Images could not be encoded")
            packed = pack([DecisionError(f"this image could not be encoded: {error}") for _ in asked])
        return packed if answers else b""
