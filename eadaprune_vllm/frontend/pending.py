"""An image or video on its way to a decision."""

from dataclasses import dataclass, replace

import msgspec
from vllm.exceptions import VLLMServerError, VLLMValidationError
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItem
from vllm.multimodal.processing.processor import ResolvedPromptUpdate

from eadaprune_vllm.core.options import PruneOptions
from eadaprune_vllm.core.report import Timing
from eadaprune_vllm.engine.model import KEPT, MM_EMBEDS
from eadaprune_vllm.messages import DecisionError, DecisionRequest, DecisionResponse, DecisionResult


@dataclass
class PendingItem:
    """An image or video that no cache has.

    Attributes:
        request: for the decision about it.
        update: the prompt's, unpruned.
        needs_decision: or else all of it is kept, as vLLM sends it.
        is_client_embedding: whether it is embeddings of a client.
        response: once there is one.
        timing: of the response.
    """

    request: DecisionRequest
    update: ResolvedPromptUpdate
    needs_decision: bool
    is_client_embedding: bool
    response: DecisionResponse | None = None
    timing: Timing | None = None

    def min_placeholders(self, options: PruneOptions) -> int:
        """How many it keeps at least."""
        unpruned = self.request.num_placeholders
        if not self.needs_decision:
            return unpruned
        num_tokens: int = unpruned - self.update.content.num_newlines
        return min(num_tokens, options.floor(num_tokens), options.max_tokens or num_tokens)

    def set_response(self, response: DecisionResponse) -> None:
        """Note the response, and let go of the pixels: only what vLLM leaves on the CPU goes on to the engine. (The
        request stays whole for others who may be sending it.)"""
        self.response = response
        left = {name: elem for name, elem in self.request.item.items() if elem.field.keep_on_cpu}
        self.request = msgspec.structs.replace(self.request, item=MultiModalKwargsItem(left))

    def decided(self) -> DecisionResult:
        """The result.

        Raises:
            VLLMServerError, VLLMValidationError: if nothing could be decided; the latter if it is the client's fault.
        """
        assert self.response
        if not isinstance(self.response, DecisionError):
            return self.response
        if self.is_client_embedding:
            raise VLLMValidationError(self.response.error, parameter="messages")
        raise VLLMServerError(self.response.error)

    def pruned(self) -> tuple[MultiModalKwargsItem, ResolvedPromptUpdate]:
        """What the engine is sent, and the prompt's update.

        Raises:
            VLLMServerError, VLLMValidationError: if nothing could be decided; the latter if it is the client's fault.
        """
        item, modality = self.request.item, self.request.modality
        if not self.needs_decision:
            return item, self.update
        result, elems = self.decided(), dict(item)
        for name, value, keep_on_cpu in ((MM_EMBEDS, result.rows, False), (KEPT, result.kept.placeholders, True)):
            config = MultiModalFieldConfig.batched(modality, keep_on_cpu=keep_on_cpu)
            (elems[modality + name],) = config.build_elems(modality + name, [value])
        return MultiModalKwargsItem(elems), replace(self.update, content=self.update.content.pruned(result.kept))
