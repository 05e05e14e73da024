"""An image or video that waits for a decision."""

from dataclasses import dataclass, replace

import msgspec
import torch
from vllm.exceptions import VLLMServerError, VLLMValidationError
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItem
from vllm.multimodal.processing.processor import ResolvedPromptUpdate

from eadaprune_vllm.core.options import KEY, PruneOptions
from eadaprune_vllm.core.prune import PruneDecision
from eadaprune_vllm.core.report import Timing
from eadaprune_vllm.core.transfer import TransferredItem
from eadaprune_vllm.engine.model import KEPT, MM_EMBEDS
from eadaprune_vllm.messages import DecisionError, DecisionRequest, DecisionResponse, DecisionResult


@dataclass
class PendingItem:
    """An image or video that is not cached.

    Attributes:
        request: for a decision about it.
        update: vLLM's prompt update without pruning.
        needs_decision: False if all of it is kept, or another instance decided.
        is_client_embedding: whether the client sent embeddings.
        response: None while the decision is pending.
        timing: of the decision.
        transferred: the decision of another instance.
    """

    request: DecisionRequest
    update: ResolvedPromptUpdate
    needs_decision: bool
    is_client_embedding: bool
    response: DecisionResponse | None = None
    timing: Timing | None = None
    transferred: PruneDecision | None = None

    def take(self, transferred: TransferredItem) -> None:
        """Take over the decision of another instance.

        Raises:
            VLLMValidationError: if it is not one about such an item.
        """
        self.needs_decision, layout, report = False, self.update.content.layout, transferred.report
        if report.visual_tokens != self.request.num_placeholders:
            raise VLLMValidationError(
                f"{KEY}: another instance decided about {report.visual_tokens} tokens where this "
                f"{self.request.modality} has {self.request.num_placeholders}",
                parameter=KEY,
            )
        if transferred.placeholders is None:
            return
        placeholders = torch.from_numpy(transferred.placeholders)
        try:
            indices = layout.indices(placeholders)
        except ValueError as error:
            raise VLLMValidationError(f"{KEY}: of another instance: {error}", parameter=KEY) from None
        self.transferred = PruneDecision(
            indices,
            placeholders,
            report.visual_tokens,
            max(layout.mrope_span - len(indices), 0),
            report.spectral_energy,
            report.span_energy,
            report.bound,
            report.selector,
        )

    def min_placeholders(self, options: PruneOptions) -> int:
        """Lower bound of the placeholders that it keeps."""
        unpruned = self.request.num_placeholders
        if self.transferred:
            return len(self.transferred.placeholders)
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
        """The item as it is sent to the engine, and the prompt update. With the decision of another instance it has its
        pixels, and what to keep of them, if it has to be encoded here.

        Raises:
            VLLMServerError, VLLMValidationError: if the decision failed; the latter if that is the client's fault.
        """
        item, modality = self.request.item, self.request.modality
        if not (self.transferred or self.needs_decision):
            return item, self.update
        elems = dict(item)
        if decision := self.transferred:
            # Items with different values of a shared field are encoded one by one: the encoder's budget counts kept
            # placeholders.
            config = MultiModalFieldConfig.shared(modality, 1, keep_on_cpu=True)
            (elems[modality + KEPT],) = config.build_elems(modality + KEPT, decision.placeholders)
        else:
            result = self.decided()
            decision = result.decision
            for name, value, keep_on_cpu in ((MM_EMBEDS, result.embeds, False), (KEPT, decision.placeholders, True)):
                config = MultiModalFieldConfig.batched(modality, keep_on_cpu=keep_on_cpu)
                (elems[modality + name],) = config.build_elems(modality + name, [value])
        return MultiModalKwargsItem(elems), replace(self.update, content=self.update.content.pruned(decision))
