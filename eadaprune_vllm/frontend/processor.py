"""The processor half of every adapter: it asks what to keep before vLLM processes a prompt.

Invariant: count and content come from one object. The engine decides once about an item; its rows, placeholders,
positions and report are all made from that decision, and travel with its cache entry.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from PIL import Image
from transformers import BatchFeature
from typing_extensions import override
from vllm.exceptions import VLLMServerError, VLLMValidationError
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import DictEmbeddingItems, EmbeddingItems
from vllm.multimodal.processing import BaseMultiModalProcessor, PromptUpdate, PromptUpdateDetails
from vllm.multimodal.processing.inputs import ProcessorInputs

from eadaprune_vllm.architectures import adapter
from eadaprune_vllm.core.options import KEY, MODALITIES, PruneOptions
from eadaprune_vllm.core.server_options import ServerOptions
from eadaprune_vllm.frontend.front_end import FrontEnd
from eadaprune_vllm.frontend.items import Item, Items, New, PrunedDetails, check_finite, may_prune, split, to_client
from eadaprune_vllm.frontend.request import Choices, RequestContext, refusals, request_layers
from eadaprune_vllm.messages import Question


class PruningProcessor(BaseMultiModalProcessor):
    """Mixin in front of a model's multimodal processor.

    Modifications:
    - of a request whose images may lose tokens, ``apply`` returns what is to be asked first; once that is known, it
      ships the kept rows in place of pixels, with as many placeholders
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
        vLLM's input of the engine; or ``Items`` with new ones about which the engine must be asked, with which this is
        to be called again.
        """
        given, others = split(inputs.hf_processor_mm_kwargs)
        if given is None:
            return super().apply(inputs, *args, **kwargs)
        assert self.front_end
        items = given if isinstance(given, Items) else self._items(inputs, given, others)
        if items.weights != self.front_end.weights:  # nothing that old ones made goes on
            items = self._items(inputs, items.choices, others)
        if items.are_read_first:
            all_read = self._read_new(inputs, items)
            if not all_read or items.undecided():
                return items
        result = super().apply(replace(inputs, hf_processor_mm_kwargs={**others, KEY: items}), *args, **kwargs)
        self._check_positions(items.skipped)
        result[KEY] = items.pruning(self.front_end.kv_bytes_per_token)
        return result

    def _items(self, inputs: ProcessorInputs, given: object, others: dict[str, Any]) -> Items:
        """The images and videos of a request, with the options that are in force for each from now on."""
        assert self.front_end
        names = to_client(inputs.mm_data_items)
        of_all = [*chain(*names.values())]
        counts = {modality: of_all.count(modality) for modality in MODALITIES}
        if not isinstance(given, Choices):  # no chat: a prompt of LLM.generate, or of raw tokens over HTTP
            with refusals(self.front_end):
                layers = request_layers(RequestContext(), {KEY: given})
                chosen = self.server_options.choose(*layers)
            given = Choices({modality: (chosen,) * count for modality, count in counts.items()})
        if counts != {modality: len(of_each) for modality, of_each in given.items()}:
            raise VLLMServerError(f"options for {given} where there are {counts}")
        hashes = super()._get_mm_hashes(replace(inputs, hf_processor_mm_kwargs=others))
        weights = self.front_end.weights
        algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
        rule = {"budget": self.server_options.budget} | ({"weights": weights} if weights else {})
        of: dict[str, list[Item]] = {}
        for modality, of_each in inputs.mm_data_items.items():
            check_finite(modality, of_each, self.info.ctx.model_config.dtype)
            of[modality] = []
            choices = given.along(names[modality])
            for name, choice, image_hash, data in zip(names[modality], choices, hashes[modality], of_each, strict=True):
                options = self.front_end.in_force(choice, image_hash, choice.answered or data is None)
                mm_hash = image_hash
                if may_prune(options):
                    mm_hash = MultiModalHasher.hash_kwargs(algorithm, item=image_hash, **{KEY: options.key}, **rule)
                of[modality].append(Item(name, image_hash, mm_hash, options, choice.options.threshold))
        return Items(of, choices=given, weights=weights)

    def _read_new(self, inputs: ProcessorInputs, items: Items) -> bool:
        """Process, one by one, items that neither the cache has nor were read before, for this request or another: no
        more at a time than one question to the engine may hold, so that other requests have their turn on this thread
        meanwhile.

        Returns:
            Whether none is left.

        Raises:
            VLLMValidationError: if data is missing, or the prompt can never fit.
        """
        assert self.front_end
        cache, fewest, room = inputs.cache, len(inputs.prompt), self.front_end.asker.most
        all_read = True
        if any(of_each.get_passthrough_data() for of_each in inputs.mm_data_items.values()):
            cache = None  # as vLLM has it
        for modality, of_each in items.of.items():
            known = cache.is_cached([item.mm_hash for item in of_each]) if cache else [False] * len(of_each)
            for index, (item, cached) in enumerate(zip(of_each, known, strict=True)):
                if cached:
                    continue
                if item.mm_hash not in items.new:
                    if room <= 0:
                        all_read = False
                        continue
                    new = self.front_end.new.get(item.mm_hash) or self.read(inputs, modality, index, item.options)
                    items.new[item.mm_hash] = self.front_end.new[item.mm_hash] = new
                    room -= new.question.num_placeholders
                new = items.new[item.mm_hash]
                fewest += new.fewest(item.options) - self.eadaprune_in_prompt(new)
                self.check_length(fewest)
        if cache:
            cache.release_sender_touches()
        return all_read

    def eadaprune_in_prompt(self, new: New) -> int:
        """How many tokens a prompt has in the place of an item's placeholders before vLLM puts these there."""
        return 1

    def check_length(self, fewest: int) -> None:
        """Raises:
        VLLMValidationError: if a prompt of at least so many tokens can never fit.
        """
        longest = self.info.ctx.model_config.max_model_len
        if fewest > longest:
            raise VLLMValidationError(
                f"This model's maximum context length is {longest} tokens, and this request has at least {fewest}, "
                "however much its images and videos are pruned. Please send fewer.",
                parameter="messages",
                value=fewest,
            )

    def read(self, inputs: ProcessorInputs, modality: str, index: int, options: PruneOptions) -> New:
        """One item as vLLM would process it by itself, and the question about it."""
        of_each, (_, others) = inputs.mm_data_items[modality], split(inputs.hf_processor_mm_kwargs)
        own = isinstance(of_each, EmbeddingItems | DictEmbeddingItems)
        if own:  # nothing is computed of them, and one cannot be taken out before
            alone, kwargs, number = inputs.mm_data_items.select({modality}), others, index
        else:
            if of_each[index] is None:
                raise _missing(f"Cache miss for {modality} at index {index} but data is not provided.")
            alone, number = self.info.parse_mm_data({modality: [of_each[index]]}, validate=False), 0
            kwargs = super()._get_cache_missing_processor_kwargs(
                replace(inputs, hf_processor_mm_kwargs=others),
                {modality: [other != index for other in range(len(of_each))]},
            )
        data = super()._apply_hf_processor_main(alone, kwargs)
        read = MultiModalKwargsItems.from_hf_inputs(data, super()._get_mm_fields_config(data, kwargs))
        (update,) = super()._get_mm_prompt_updates(alone, kwargs, read)[modality][number]
        question = Question(modality, read[modality][number], options.key, int(update.content.embeds.sum()))
        return New(question, update, may_prune(options), own)

    def _check_positions(self, skipped: int) -> None:
        """Raises:
        VLLMValidationError: if positions could run off the model's table of rotary embeddings, which would stop the
            engine. vLLM makes tables for four times the model's length, and checks tokens only.
        """
        model, text = self.info.ctx.model_config, self.info.ctx.model_config.hf_text_config
        if not model.uses_mrope:
            return
        longest, rope = text.max_position_embeddings, getattr(text, "rope_parameters", None) or {}
        if rope.get("rope_type") == "yarn":
            longest = int(rope["original_max_position_embeddings"] * rope["factor"])
        if model.max_model_len + skipped > 4 * longest:
            raise VLLMValidationError(
                f"the images and videos of this request span up to {skipped} positions more than it has tokens, and "
                f"this model has {4 * longest} positions in all; send fewer, smaller or less pruned ones",
                parameter="messages",
            )

    @override
    def _cached_apply_hf_processor(self, inputs: ProcessorInputs, *args: Any, **kwargs: Any) -> Any:
        result = super()._cached_apply_hf_processor(inputs, *args, **kwargs)
        items, _ = split(inputs.hf_processor_mm_kwargs)
        if items is not None:
            for modality, updates in result.prompt_updates.items():
                for (update,), item in zip(updates, items.of.get(modality, ()), strict=True):
                    items.done(item, update.content)
        return result

    @override
    def _get_mm_hashes(self, inputs: ProcessorInputs) -> Any:
        items, _ = split(inputs.hf_processor_mm_kwargs)
        if items is None:
            return super()._get_mm_hashes(inputs)
        return {modality: [item.mm_hash for item in of_each] for modality, of_each in items.of.items()}

    @override
    def _get_cache_missing_items(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._get_cache_missing_items(*args, **kwargs)
        except ValueError as error:
            if "data is not provided" not in str(error):
                raise
            raise _missing(str(error)) from None

    @override
    def _get_cache_missing_processor_kwargs(self, inputs: ProcessorInputs, mm_is_cached: Any) -> Mapping[str, Any]:
        items, others = split(inputs.hf_processor_mm_kwargs)
        kwargs = super()._get_cache_missing_processor_kwargs(
            replace(inputs, hf_processor_mm_kwargs=others), mm_is_cached
        )
        return kwargs if items is None else {**kwargs, KEY: items.missing(mm_is_cached)}

    @override
    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> BatchFeature:
        items, others = split(hf_kwargs)
        if items is not None and items.are_read_first:
            return BatchFeature()  # each was processed by itself
        return super()._apply_hf_processor_main(mm_items, others)

    @override
    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, Any]
    ) -> Mapping[str, MultiModalFieldConfig]:
        items, others = split(hf_processor_mm_kwargs)
        return {} if items is not None and items.are_read_first else super()._get_mm_fields_config(hf_inputs, others)

    @override
    def _get_mm_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: MultiModalKwargsItems
    ) -> Any:
        items, others = split(hf_processor_mm_kwargs)
        if items is None or not items.are_read_first:
            return super()._get_mm_prompt_updates(mm_items, others, out_mm_kwargs)
        updates: dict[str, list[Any]] = {}
        for modality, of_each in items.of.items():
            results = [items.new[item.mm_hash].result() for item in of_each]
            out_mm_kwargs[modality] = [item for item, _ in results]  # what vLLM goes on with
            updates[modality] = [
                [self._recompute_cached_prompt_update(update, index)] for index, (_, update) in enumerate(results)
            ]
        return updates

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


def _missing(reason: str) -> VLLMValidationError:
    return VLLMValidationError(
        f"{reason} What is sent by its uuid alone must have been sent before, under the same pruning options.",
        parameter="messages",
    )
