"""The processor's half of every adapter: it gets decisions from the engine before vLLM processes a prompt.

Invariant: count and content come from one object. The engine decides once about an item. Its embeddings, placeholders,
positions and report are all derived from this decision, and stored in one cache entry.
"""

import itertools
from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from PIL import Image
from typing_extensions import override
from vllm.exceptions import VLLMServerError, VLLMValidationError
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.inputs import MultiModalKwargsItems
from vllm.multimodal.processing import BaseMultiModalProcessor, PromptUpdate, PromptUpdateDetails
from vllm.multimodal.processing.inputs import ProcessorInputs
from vllm.multimodal.processing.processor import MultiModalProcessingResult

from eadaprune_vllm.architectures import adapter
from eadaprune_vllm.core.options import KEY, MODALITIES, PruneOptions
from eadaprune_vllm.core.server_options import ServerOptions
from eadaprune_vllm.frontend.context import RequestContext
from eadaprune_vllm.frontend.front_end import FrontEnd
from eadaprune_vllm.frontend.items import Item, Items, PrunedDetails, client_modalities, may_prune, split
from eadaprune_vllm.frontend.limits import are_embeddings, check_embeddings, check_length, check_positions
from eadaprune_vllm.frontend.pending import PendingItem
from eadaprune_vllm.frontend.request_options import Choices, option_sources
from eadaprune_vllm.frontend.transfer import TRANSFER, Transfer
from eadaprune_vllm.messages import DecisionRequest

Steps = Generator[list[PendingItem], None, Any]


class PruningProcessor(BaseMultiModalProcessor):
    """Mixin in front of a model's multimodal processor.

    Modifications:
    - for a request, ``apply`` returns steps, between which the engine decides about images and videos that may lose
      tokens; these are sent as embeddings of the kept tokens instead of pixels, with as many placeholders
    - the options of an item that may lose tokens are part of its cache key
    - items that may lose none, warm-up and profiling are vLLM's, unchanged
    """

    front_end: FrontEnd | None = None  # set in front-end processes only

    @property
    def server_options(self) -> ServerOptions:
        return ServerOptions.of(self.info.ctx.get_mm_config())

    @override
    def apply(self, inputs: ProcessorInputs, *args: Any, **kwargs: Any) -> Any:
        """Returns:
        vLLM's engine input; for a request the steps that make it.
        """
        given, others = split(inputs.hf_processor_mm_kwargs)
        if given is None:
            return super().apply(inputs, *args, **kwargs)
        transfer, others = split(others, TRANSFER)
        return self.steps(replace(inputs, hf_processor_mm_kwargs=others), given, transfer, *args, **kwargs)

    def steps(
        self, inputs: ProcessorInputs, given: object, transfer: Transfer | None, *args: Any, **kwargs: Any
    ) -> Steps:
        """How the images and videos of a request are processed: resolve their options, read new items, have the engine
        decide about these, and let vLLM make its engine input.

        Each step runs on vLLM's only thread for processing, because requests must be sent in the order in which they
        were processed. Other requests use the thread while the engine decides.

        Args:
            inputs: vLLM's, without our options.
            given: the options: ``Choices`` for a chat, or one value for all images and videos of a prompt.
            transfer: the decisions of other instances.

        Yields:
            The items that the engine has to decide about before the next step.

        Returns:
            vLLM's engine input.

        Raises:
            VLLMServerError, VLLMValidationError: if a decision fails, or the request cannot be served; the latter if
                that is the client's fault.
        """
        assert self.front_end
        items = self._resolve(inputs, given, transfer)
        while True:
            if items.weights_changed_at != self.front_end.weights_changed_at:  # start again with the new weights
                items = self._resolve(inputs, items.choices, transfer)
            self._look_up(inputs, items)
            if not items.any_prunable:
                break
            all_read, undecided = self._read_new(inputs, items), items.undecided()
            if all_read and not undecided:
                break
            yield undecided
        kwargs_with_items = {**inputs.hf_processor_mm_kwargs, KEY: items}
        result = super().apply(replace(inputs, hf_processor_mm_kwargs=kwargs_with_items), *args, **kwargs)
        check_positions(self.info.ctx.model_config, items.position_slack)
        result[KEY] = items.pruning(self.front_end.kv_bytes_per_token)
        return result

    def _resolve(self, inputs: ProcessorInputs, given: object, transfer: Transfer | None) -> Items:
        """The images and videos of a request, with their effective options and cache keys."""
        assert self.front_end
        names = client_modalities(inputs.mm_data_items)
        all_names = [*chain(*names.values())]
        counts = {modality: all_names.count(modality) for modality in MODALITIES}
        if not isinstance(given, Choices):  # not a chat: a prompt of LLM.generate, or raw tokens over HTTP
            with self.front_end.refusals():
                sources = option_sources(RequestContext(), {KEY: given})
                choice = self.server_options.choose(*sources)
            given = Choices({modality: (choice,) * count for modality, count in counts.items()})
        if counts != {modality: len(choices) for modality, choices in given.items()}:
            raise VLLMServerError(f"there are options for {given}, but the request has {counts}")
        hashes = super()._get_mm_hashes(inputs)
        weights_changed_at = self.front_end.weights_changed_at
        algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
        hash_kwargs: dict[str, Any] = {"budget": self.server_options.budget}
        if weights_changed_at:
            hash_kwargs["weights"] = weights_changed_at
        by_modality: dict[str, list[Item]] = {}
        numbers = defaultdict[str, Iterator[int]](itertools.count)
        for modality, mm_items in inputs.mm_data_items.items():
            by_modality[modality] = []
            each = zip(names[modality], given.for_items(names[modality]), hashes[modality], mm_items, strict=True)
            for index, (name, choice, image_hash, data) in enumerate(each):
                sticky = choice.from_previous_turn or data is None
                options, mm_hash = self.front_end.effective_options(choice, image_hash, sticky), image_hash
                key, transferred = options.key if may_prune(options) else None, None
                if transfer:
                    transferred = transfer.decision(name, next(numbers[name]), image_hash, is_needed=key is not None)
                if transferred:
                    key = transferred.kept
                if are_embeddings(mm_items):
                    check_embeddings(modality, index, data, self.info.ctx.model_config, bool(transferred))
                if key is not None:
                    mm_hash = MultiModalHasher.hash_kwargs(algorithm, item=image_hash, **{KEY: key, **hash_kwargs})
                by_modality[modality].append(
                    Item(name, image_hash, mm_hash, options, choice.options.threshold, transferred=transferred)
                )
        return Items(by_modality, choices=given, weights_changed_at=weights_changed_at)

    def _look_up(self, inputs: ProcessorInputs, items: Items) -> None:
        """Look up which items vLLM's processor cache has, before each step: other requests may have changed it.

        Raises:
            VLLMValidationError: if an item is not cached and has a uuid but no data.
        """
        cache = _cache(inputs)
        for modality, modality_items in items.by_modality.items():
            are_cached = [False] * len(modality_items)
            if cache:
                try:
                    are_cached = cache.is_cached([item.mm_hash for item in modality_items])
                finally:
                    cache.release_sender_touches()
            for index, (item, is_cached) in enumerate(zip(modality_items, are_cached, strict=True)):
                item.cached = is_cached
                if not is_cached and inputs.mm_data_items[modality][index] is None:
                    raise VLLMValidationError(
                        f"Cache miss for {modality} at index {index} but data is not provided. An item that is sent by "
                        "its uuid alone must have been sent before, with the same pruning options.",
                        parameter="messages",
                    )

    def _read_new(self, inputs: ProcessorInputs, items: Items) -> bool:
        """Process, one by one, items that are neither cached nor pending in this request or another. One call processes
        at most one batch for the engine, so that other requests may use this thread in between.

        Returns:
            Whether all were processed.

        Raises:
            VLLMValidationError: if the prompt is too long for the model.
        """
        assert self.front_end
        min_length, remaining = len(inputs.prompt), self.front_end.decision_client.max_batch_tokens
        all_read = True
        for modality, modality_items in items.by_modality.items():
            for index, item in enumerate(modality_items):
                if item.cached:
                    continue
                if item.mm_hash not in items.pending:
                    if remaining <= 0:
                        all_read = False
                        continue
                    new = self.front_end.pending.get(item.mm_hash) or self.read(inputs, modality, index, item.options)
                    if item.transferred:
                        new.take(item.transferred)
                    items.pending[item.mm_hash] = self.front_end.pending[item.mm_hash] = new
                    remaining -= new.request.num_placeholders
                new = items.pending[item.mm_hash]
                min_length += new.min_placeholders(item.options) - self.eadaprune_replaced_tokens(new)
                check_length(self.info.ctx.model_config, min_length)
        return all_read

    def eadaprune_replaced_tokens(self, new: PendingItem) -> int:
        """Number of prompt tokens that vLLM replaces by the placeholders of an item."""
        return 1

    def read(self, inputs: ProcessorInputs, modality: str, index: int, options: PruneOptions) -> PendingItem:
        """Process one item as vLLM would process it by itself, and make the decision request about it."""
        mm_items = inputs.mm_data_items[modality]
        is_client_embedding = are_embeddings(mm_items)
        if is_client_embedding:  # these need no processing, and vLLM has no way to select one of them
            alone, kwargs, number = inputs.mm_data_items.select({modality}), inputs.hf_processor_mm_kwargs, index
        else:
            alone, number = self.info.parse_mm_data({modality: [mm_items[index]]}, validate=False), 0
            others = {modality: [other != index for other in range(len(mm_items))]}
            kwargs = super()._get_cache_missing_processor_kwargs(inputs, others)
        data = super()._apply_hf_processor_main(alone, kwargs)
        read = MultiModalKwargsItems.from_hf_inputs(data, super()._get_mm_fields_config(data, kwargs))
        (update,) = super()._get_mm_prompt_updates(alone, kwargs, read)[modality][number]
        request = DecisionRequest(modality, read[modality][number], options.key, int(update.content.embeds.sum()))
        return PendingItem(request, update, may_prune(options), is_client_embedding)

    @override
    def _cached_apply_hf_processor(self, inputs: ProcessorInputs, *args: Any, **kwargs: Any) -> Any:
        items, others = split(inputs.hf_processor_mm_kwargs)
        inputs = replace(inputs, hf_processor_mm_kwargs=others)
        if items is None:
            return super()._cached_apply_hf_processor(inputs, *args, **kwargs)
        if items.any_prunable:
            result = self._merged(inputs, items)
        else:
            result = super()._cached_apply_hf_processor(inputs, *args, **kwargs)
        for modality, updates in result.prompt_updates.items():
            for (update,), item in zip(updates, items.by_modality.get(modality, ()), strict=True):
                items.add_report(item, update.content)
        return result

    def _merged(self, inputs: ProcessorInputs, items: Items) -> MultiModalProcessingResult:
        """vLLM's result of processing: decided items merged with those in vLLM's cache."""
        hashes = {modality: [item.mm_hash for item in each] for modality, each in items.by_modality.items()}
        are_cached = {modality: [item.cached for item in each] for modality, each in items.by_modality.items()}
        data: dict[str, list[Any]] = {}
        updates: dict[str, list[Any]] = {}
        for modality, modality_items in items.by_modality.items():
            new = [items.pending[item.mm_hash].pruned() for item in modality_items if not item.cached]
            data[modality] = [item for item, _ in new]
            updates[modality] = [
                [self._recompute_cached_prompt_update(update, index)] for index, (_, update) in enumerate(new)
            ]
        merged: Any = MultiModalKwargsItems(data)
        if cache := _cache(inputs):
            try:
                merged, updates = self._merge_mm_kwargs(cache, hashes, are_cached, merged, updates)
            finally:
                cache.release_sender_touches()
        return MultiModalProcessingResult(self._postprocess_prompt(inputs.prompt), merged, hashes, updates)

    @override
    def _recompute_cached_prompt_update(self, cached_update: Any, new_item_idx: int) -> Any:
        update = super()._recompute_cached_prompt_update(cached_update, new_item_idx)
        known, content = cached_update.content, update.content  # vLLM makes a new one if it depends on the index
        return replace(update, content=replace(known, full=content.full, is_embed=content.is_embed))

    @override
    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: MultiModalKwargsItems
    ) -> Sequence[PromptUpdate]:
        model = self.info.ctx.model_config

        def unpruned(update: PromptUpdate) -> PromptUpdate:
            def replacement(item_idx: int) -> PrunedDetails:
                details = update.replacement(item_idx)
                if not isinstance(details, PromptUpdateDetails):
                    details = PromptUpdateDetails(details)
                content = PrunedDetails(details.full, details.is_embed)
                data, length = out_mm_kwargs[update.modality][item_idx].get_data(), int(content.embeds.sum())
                try:
                    layout = adapter(model.architecture).eadaprune_layout(
                        model.hf_config, update.modality, data, length
                    )
                except ValueError as error:
                    raise VLLMValidationError(str(error), parameter="messages") from None
                return replace(content, num_newlines=int(layout.is_newline.sum()), layout=layout)

            return replace(update, replacement=replacement)

        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        return [unpruned(update) for update in updates]

    def eadaprune_background(self, item: Any, count: int, number: int) -> Image.Image:
        """The picture under grid ``number`` of ``count``: the image, or of a video a frame at that time."""
        if isinstance(item, dict):
            item = item["image"]  # a vision chunk
        if isinstance(item, Image.Image):
            return item
        frames = item[0] if isinstance(item, tuple) else item
        return Image.fromarray(frames[len(frames) * number // count])


def _cache(inputs: ProcessorInputs) -> Any:
    """vLLM's processor cache, if it applies: not to requests with passthrough data, as in vLLM."""
    has_passthrough = any(mm_items.get_passthrough_data() for mm_items in inputs.mm_data_items.values())
    return None if has_passthrough else inputs.cache
