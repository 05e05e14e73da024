"""The processor half of every adapter: it asks what to keep before vLLM processes a prompt.

Invariant: count and content come from one object. The engine decides once about an item; its rows, placeholders,
positions and report are all made from that decision, and travel with its cache entry.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from PIL import Image
from typing_extensions import override
from vllm.exceptions import VLLMServerError, VLLMValidationError
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.inputs import MultiModalKwargsItems
from vllm.multimodal.parse import DictEmbeddingItems, EmbeddingItems
from vllm.multimodal.processing import BaseMultiModalProcessor, PromptUpdate, PromptUpdateDetails
from vllm.multimodal.processing.inputs import ProcessorInputs
from vllm.multimodal.processing.processor import MultiModalProcessingResult

from eadaprune_vllm.architectures import adapter
from eadaprune_vllm.core.options import KEY, MODALITIES, PruneOptions
from eadaprune_vllm.core.server_options import ServerOptions
from eadaprune_vllm.frontend.context import RequestContext
from eadaprune_vllm.frontend.front_end import FrontEnd
from eadaprune_vllm.frontend.items import Item, Items, PrunedDetails, may_prune, split, to_client
from eadaprune_vllm.frontend.limits import check_finite, check_length, check_positions
from eadaprune_vllm.frontend.pending import PendingItem
from eadaprune_vllm.frontend.request_options import Choices, option_sources
from eadaprune_vllm.messages import DecisionRequest

Steps = Generator[list[PendingItem], None, Any]


class PruningProcessor(BaseMultiModalProcessor):
    """Mixin in front of a model's multimodal processor.

    Modifications:
    - of a request ``apply`` returns steps, between which the engine decides about images and videos that may lose
      tokens; these are sent as the kept rows instead of pixels, with as many placeholders
    - options that may take tokens away are part of an item's cache key, as one canonical string
    - what may lose none is processed by vLLM, and so is what is no request: warm-up and profiling
    """

    front_end: FrontEnd | None = None  # set in front-end processes only

    @property
    def server_options(self) -> ServerOptions:
        return ServerOptions.of(self.info.ctx.get_mm_config())

    @override
    def apply(self, inputs: ProcessorInputs, *args: Any, **kwargs: Any) -> Any:
        """Returns:
        vLLM's input of the engine; of a request the steps that make it.
        """
        given, others = split(inputs.hf_processor_mm_kwargs)
        if given is None:
            return super().apply(inputs, *args, **kwargs)
        return self.steps(replace(inputs, hf_processor_mm_kwargs=others), given, *args, **kwargs)

    def steps(self, inputs: ProcessorInputs, given: object, *args: Any, **kwargs: Any) -> Steps:
        """The way of a request's images and videos: options are resolved, what is new is read, the engine decides about
        it, and vLLM makes its input of what was decided.

        Each step runs on vLLM's one thread for processing, as the order of processing is that of sending. Others have
        their turn there while the engine decides.

        Args:
            inputs: vLLM's, without our options.
            given: the options: ``Choices`` of a chat, or those of all images and videos of a prompt.

        Yields:
            What the engine is to decide about before the next step.

        Returns:
            vLLM's input of the engine.

        Raises:
            VLLMServerError, VLLMValidationError: if nothing can be decided, or the request cannot be served; the latter
                if that is the client's fault.
        """
        assert self.front_end
        items = self._resolved(inputs, given)
        while items.any_prunable:
            if items.weights != self.front_end.weights:  # nothing that old ones made goes on
                items = self._resolved(inputs, items.choices)
            all_read, undecided = self._read_new(inputs, items), items.undecided()
            if all_read and not undecided:
                break
            yield undecided
        kwargs_with_items = {**inputs.hf_processor_mm_kwargs, KEY: items}
        result = super().apply(replace(inputs, hf_processor_mm_kwargs=kwargs_with_items), *args, **kwargs)
        check_positions(self.info.ctx.model_config, items.position_slack)
        result[KEY] = items.pruning(self.front_end.kv_bytes_per_token)
        return result

    def _resolved(self, inputs: ProcessorInputs, given: object) -> Items:
        """The images and videos of a request, with the options that are in force for each from now on."""
        assert self.front_end
        names = to_client(inputs.mm_data_items)
        of_all = [*chain(*names.values())]
        counts = {modality: of_all.count(modality) for modality in MODALITIES}
        if not isinstance(given, Choices):  # no chat: a prompt of LLM.generate, or of raw tokens over HTTP
            with self.front_end.refusals():
                sources = option_sources(RequestContext(), {KEY: given})
                chosen = self.server_options.choose(*sources)
            given = Choices({modality: (chosen,) * count for modality, count in counts.items()})
        if counts != {modality: len(of_each) for modality, of_each in given.items()}:
            raise VLLMServerError(f"options for {given} where there are {counts}")
        hashes = super()._get_mm_hashes(inputs)
        weights = self.front_end.weights
        algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
        rule = {"budget": self.server_options.budget} | ({"weights": weights} if weights else {})
        of: dict[str, list[Item]] = {}
        for modality, of_each in inputs.mm_data_items.items():
            check_finite(modality, of_each, self.info.ctx.model_config.dtype)
            of[modality] = []
            choices = given.along(names[modality])
            for name, choice, image_hash, data in zip(names[modality], choices, hashes[modality], of_each, strict=True):
                options = self.front_end.effective_options(
                    choice, image_hash, choice.from_previous_turn or data is None
                )
                mm_hash = image_hash
                if may_prune(options):
                    mm_hash = MultiModalHasher.hash_kwargs(algorithm, item=image_hash, **{KEY: options.key}, **rule)
                of[modality].append(Item(name, image_hash, mm_hash, options, choice.options.threshold))
        return Items(of, choices=given, weights=weights)

    def _read_new(self, inputs: ProcessorInputs, items: Items) -> bool:
        """Process, one by one, items that neither the cache has nor were read before, for this request or another: no
        more at a time than one batch for the engine may hold, so that other requests have their turn on this thread
        meanwhile.

        Returns:
            Whether none is left.

        Raises:
            VLLMValidationError: if data is missing, or the prompt can never fit.
        """
        assert self.front_end
        min_length, remaining = len(inputs.prompt), self.front_end.decision_client.max_encoder_tokens
        all_read = True
        for modality, of_each in items.by_modality.items():
            for index, (item, is_cached) in enumerate(zip(of_each, self._are_cached(inputs, of_each), strict=True)):
                if is_cached:
                    continue
                if item.mm_hash not in items.pending:
                    if remaining <= 0:
                        all_read = False
                        continue
                    new = self.front_end.pending.get(item.mm_hash) or self.read(inputs, modality, index, item.options)
                    items.pending[item.mm_hash] = self.front_end.pending[item.mm_hash] = new
                    remaining -= new.request.num_placeholders
                new = items.pending[item.mm_hash]
                min_length += new.min_placeholders(item.options) - self.eadaprune_replaced_tokens(new)
                check_length(self.info.ctx.model_config, min_length)
        return all_read

    def eadaprune_replaced_tokens(self, new: PendingItem) -> int:
        """How many tokens of a prompt the placeholders of an item replace."""
        return 1

    def read(self, inputs: ProcessorInputs, modality: str, index: int, options: PruneOptions) -> PendingItem:
        """One item as vLLM would process it by itself, and the request for a decision about it."""
        of_each = inputs.mm_data_items[modality]
        is_client_embedding = isinstance(of_each, EmbeddingItems | DictEmbeddingItems)
        if is_client_embedding:  # nothing is computed of them, and one cannot be taken out before
            alone, kwargs, number = inputs.mm_data_items.select({modality}), inputs.hf_processor_mm_kwargs, index
        else:
            _check_data(modality, of_each, index)
            alone, number = self.info.parse_mm_data({modality: [of_each[index]]}, validate=False), 0
            others = {modality: [other != index for other in range(len(of_each))]}
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
        for modality, of_each in items.by_modality.items():
            for index, (item, is_cached) in enumerate(zip(of_each, self._are_cached(inputs, of_each), strict=True)):
                item.cached = is_cached
                if not is_cached:
                    _check_data(modality, inputs.mm_data_items[modality], index)
        if items.any_prunable:
            result = self._merged(inputs, items)
        else:
            result = super()._cached_apply_hf_processor(inputs, *args, **kwargs)
        for modality, updates in result.prompt_updates.items():
            for (update,), item in zip(updates, items.by_modality.get(modality, ()), strict=True):
                items.add_report(item, update.content)
        return result

    def _merged(self, inputs: ProcessorInputs, items: Items) -> MultiModalProcessingResult:
        """What was decided about a request's images and videos, together with what vLLM's cache has."""
        hashes = {modality: [item.mm_hash for item in of_each] for modality, of_each in items.by_modality.items()}
        are_cached = {modality: [item.cached for item in of_each] for modality, of_each in items.by_modality.items()}
        data: dict[str, list[Any]] = {}
        updates: dict[str, list[Any]] = {}
        for modality, of_each in items.by_modality.items():
            new = [items.pending[item.mm_hash].pruned() for item in of_each if not item.cached]
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

    def _are_cached(self, inputs: ProcessorInputs, items: Sequence[Item]) -> list[bool]:
        cache = _cache(inputs)
        if not cache:
            return [False] * len(items)
        try:
            return list(cache.is_cached([item.mm_hash for item in items]))
        finally:
            cache.release_sender_touches()

    @override
    def _recompute_cached_prompt_update(self, cached_update: Any, new_item_idx: int) -> Any:
        update = super()._recompute_cached_prompt_update(cached_update, new_item_idx)
        known, content = cached_update.content, update.content  # which is another if it tells the number
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
                return replace(content, num_newlines=int(layout.is_newline.sum()))

            return replace(update, replacement=replacement)

        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        return [unpruned(update) for update in updates]

    def view(self, item: Any, count: int, number: int) -> Image.Image:
        """What one of ``count`` grids lies over: the image each time, or the frames of a video at equal distances."""
        if isinstance(item, dict):
            item = item["image"]  # of a chunk
        if isinstance(item, Image.Image):
            return item
        frames = item[0] if isinstance(item, tuple) else item
        return Image.fromarray(frames[len(frames) * number // count])


def _cache(inputs: ProcessorInputs) -> Any:
    """vLLM's cache, unless the request has data that goes past it."""
    passes = any(of_each.get_passthrough_data() for of_each in inputs.mm_data_items.values())
    return None if passes else inputs.cache


def _check_data(modality: str, of_each: Any, index: int) -> None:
    """Raises:
    VLLMValidationError: if an item came by its uuid alone.
    """
    if of_each[index] is None:
        raise VLLMValidationError(
            f"Cache miss for {modality} at index {index} but data is not provided. What is sent by its uuid alone must "
            "have been sent before, under the same pruning options.",
            parameter="messages",
        )
