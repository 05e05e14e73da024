"""An image or video that waits for a decision."""

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
    """An image or video that is not cached.

    Attributes:
        request: for a decision about it.
        update: vLLM's prompt update without pruning.
        needs_decision: False if all of it is kept.
        is_client_embedding: whether the client sent embeddings.
        response: None while the decision is pending.
        timing: of the decision.
    """

    request: DecisionRequest
    update: ResolvedPromptUpdate
    needs_decision: bool
    is_client_embedding: bool
    response: DecisionResponse | None = None
    timing: Timing | None = None

    def min_placeholders(self, options: PruneOptions) -> int:
        """Lower bound of the placeholders that it keeps."""
        unpruned = self.request.num_placeholders
        if not self.needs_decision:
            return unpruned
        num_tokens: int = unpruned - self.update.content.num_newlines
        return min(num_tokens, options.floor(num_tokens), options.max_tokens or num_tokens)

    def set_response(self, response: DecisionResponse) -> None:
        """Set the response, and free the pixels: of the item only fields that vLLM keeps on the CPU are still needed.
        (The request object itself is not changed, because it may be in a batch that is being sent.)"""
        self.response = response
        on_cpu = {name: elem for name, elem in self.request.item.items() if elem.field.keep_on_cpu}
        self.request = msgspec.structs.replace(self.request, item=MultiModalKwargsItem(on_cpu))

    def decided(self) -> DecisionResult:
        """The result of the decision.

        Raises:
            VLLMServerError, VLLMValidationError: if it failed; the latter if that is the client's fault.
        """
        assert self.response
        if not isinstance(self.response, DecisionError):
            return self.response
        if self.is_client_embedding:
            raise VLLMValidationError(self.response.error, parameter="messages")
        raise VLLMServerError(self.response.error)

    def pruned(self) -> tuple[MultiModalKwargsItem, ResolvedPromptUpdate]:
        """The item as it is sent to the engine, and the prompt update.

        Raises:
            VLLMServerError, VLLMValidationError: if the decision failed; the latter if that is the client's fault.
        """
        item, modality = self.request.item, self.request.modality
        if not self.needs_decision:
            return item, self.update
        result, elems = self.decided(), dict(item)
        decision = result.decision
        for name, value, keep_on_cpu in ((MM_EMBEDS, result.embeds, False), (KEPT, decision.placeholders, True)):
            config = MultiModalFieldConfig.batched(modality, keep_on_cpu=keep_on_cpu)
            (elems[modality + name],) = config.build_elems(modality + name, [value])
        return MultiModalKwargsItem(elems), replace(self.update, content=self.update.content.pruned(decision))
