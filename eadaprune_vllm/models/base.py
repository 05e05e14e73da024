"""The processor half of every adapter: it prunes.

Invariant: count and content come from one object. ``FrontEnd.prune`` decides once; the rows, the placeholders, the
positions and the report of an item are all made from that decision, and travel with its cache entry.
"""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature
from typing_extensions import override
from vllm.exceptions import VLLMServerError, VLLMValidationError
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems, PlaceholderRange
from vllm.multimodal.parse import DictEmbeddingItems, EmbeddingItems
from vllm.multimodal.processing import BaseMultiModalProcessor, PromptUpdate, PromptUpdateDetails
from vllm.multimodal.processing.inputs import ProcessorInputs

from eadaprune_vllm.front_end import FrontEnd
from eadaprune_vllm.models import encoder_class
from eadaprune_vllm.models.fields import FEATURES, KEPT, NEWLINES, ROWS, fields_of
from eadaprune_vllm.models.items import (
    Items,
    PrunedDetails,
    embeddings_of,
    joined,
    refused_features,
    report_of,
    split,
)
from eadaprune_vllm.options import KEY, ServerOptions
from eadaprune_vllm.prune import Encoding
from eadaprune_vllm.report import Pruning, Timing
from eadaprune_vllm.request import MODALITIES, Choices, RequestContext, refusals, request_layers


class PruningProcessor(BaseMultiModalProcessor):
    """Mixin in front of a model's multimodal processor.

    Modifications:
    - an item's resolved options are part of its cache key, as one canonical string
    - ships the kept rows in place of pixels, and what else of the item is no tensor for the tower
    - as many placeholders as rows
    - dummy inputs are zero rows of the full size; they never need the encoder
    """

    front_end: FrontEnd | None = None  # set in front-end processes only

    @property
    def server_options(self) -> ServerOptions:
        options: ServerOptions = getattr(self.info.ctx.get_mm_config(), KEY)
        return options

    @override
    def apply(self, inputs: ProcessorInputs, *args: Any, **kwargs: Any) -> Any:
        assert self.front_end, "images are encoded in front-end processes only"
        items = self._items(inputs)
        with_items = replace(inputs, hf_processor_mm_kwargs={**inputs.hf_processor_mm_kwargs, KEY: items})
        result = super().apply(with_items, *args, **kwargs)
        self._check_positions(items.skipped)
        result[KEY] = Pruning(
            items.reports, sum(items.seconds), self.front_end.kv_bytes_per_token, items.timings, items.identifiers
        )
        return result

    def _items(self, inputs: ProcessorInputs) -> Items:
        """The images and videos of a request, with the options that are in force for each from now on."""
        assert self.front_end
        counts = {modality: inputs.mm_data_items.get_count(modality, strict=False) for modality in MODALITIES}
        others = {name: value for name, value in inputs.hf_processor_mm_kwargs.items() if name != KEY}
        choices = inputs.hf_processor_mm_kwargs.get(KEY)
        if not isinstance(choices, Choices):  # no chat: a prompt of LLM.generate, or of raw tokens over HTTP
            with refusals(self.front_end):
                layers = request_layers(RequestContext(), inputs.hf_processor_mm_kwargs)
                chosen = self.server_options.choose(*layers)
            choices = Choices({modality: (chosen,) * count for modality, count in counts.items()})
        if counts != {modality: len(of_each) for modality, of_each in choices.items()}:
            raise VLLMServerError(f"options for {choices} where there are {counts}")
        hashes = super()._get_mm_hashes(replace(inputs, hf_processor_mm_kwargs=others))
        return Items(
            hashes,
            options={
                modality: tuple(
                    self.front_end.in_force(choice, hashes[modality][index], choice.answered or of_each[index] is None)
                    for index, choice in enumerate(choices[modality])
                )
                for modality, of_each in inputs.mm_data_items.items()
            },
            requested={modality: [choice.options.threshold for choice in of] for modality, of in choices.items()},
            cached={modality: [False] * count for modality, count in counts.items()},
        )

    def _check_positions(self, skipped: int) -> None:
        """Raises:
        VLLMValidationError: if positions could run off the model's table of rotary embeddings, which would stop the
            engine. vLLM makes tables for four times the model's length, and checks tokens only.
        """
        model, text = self.info.ctx.model_config, self.info.ctx.model_config.hf_text_config
        longest, rope = text.max_position_embeddings, getattr(text, "rope_parameters", None) or {}
        if rope.get("rope_type") == "yarn":
            longest = int(rope["original_max_position_embeddings"] * rope["factor"])
        if model.uses_mrope and model.max_model_len + skipped > 4 * longest:
            raise VLLMValidationError(
                f"the images and videos of this request span up to {skipped} positions more than it has tokens, and "
                f"this model has {4 * longest} positions in all; send fewer, smaller or less pruned ones",
                parameter="messages",
            )

    @override
    def _cached_apply_hf_processor(self, inputs: ProcessorInputs, *args: Any, **kwargs: Any) -> Any:
        result = super()._cached_apply_hf_processor(inputs, *args, **kwargs)
        items, _ = split(inputs.hf_processor_mm_kwargs)
        for modality, updates in result.prompt_updates.items():
            hashes = zip(*(found.get(modality, ()) for found in (result.hashes, items.hashes)), strict=True)
            each = zip(updates, items.cached[modality], items.requested[modality], hashes, strict=True)
            for (update,), cached, requested, (mm_hash, unpruned) in each:
                items.identifiers[mm_hash] = f"{unpruned}-{update.content.digest}"
                this_time = {"cached": cached, "energy_requested": requested}
                items.reports[modality].append(update.content.report.model_copy(update=this_time))
                items.skipped += update.content.skipped
        return result

    @override
    def _get_mm_hashes(self, inputs: ProcessorInputs) -> Any:
        items, _ = split(inputs.hf_processor_mm_kwargs)
        algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
        return {
            modality: [
                MultiModalHasher.hash_kwargs(algorithm, item=item, **{KEY: options.key})
                for item, options in zip(of_each, items.options[modality], strict=True)
            ]
            for modality, of_each in items.hashes.items()
        }

    @override
    def _get_cache_missing_items(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._get_cache_missing_items(*args, **kwargs)
        except ValueError as error:
            if "data is not provided" not in str(error):
                raise
            raise VLLMValidationError(
                f"{error} What is sent by its uuid alone must have been sent before, under the same pruning options.",
                parameter="messages",
            ) from None

    @override
    def _get_cache_missing_processor_kwargs(self, inputs: ProcessorInputs, mm_is_cached: Any) -> Mapping[str, Any]:
        items, others = split(inputs.hf_processor_mm_kwargs)
        items.cached |= mm_is_cached
        missing = {
            modality: tuple(of for of, cached in zip(of_each, items.cached[modality], strict=True) if not cached)
            for modality, of_each in items.options.items()
        }
        others = super()._get_cache_missing_processor_kwargs(
            replace(inputs, hf_processor_mm_kwargs=others), mm_is_cached
        )
        return {**others, KEY: replace(items, options=missing)}

    @override
    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> BatchFeature:
        assert self.front_end
        items, others = split(hf_kwargs)
        batch: dict[str, Any] = {}
        for modality, of_each in items.options.items():
            # One item per call, here as in the encoder: what comes out must not depend on its neighbours.
            for index, options in enumerate(of_each):
                source, metadata = self.source(mm_items, modality, index, others)
                started, start = time.time_ns(), time.perf_counter()
                with refused_features(source):
                    rows, kept, stages = self.front_end.prune(source, options)
                items.seconds.append(time.perf_counter() - start)
                items.timings.append(Timing(modality, started, stages))
                items.kept[modality].append(kept)
                projected = isinstance(source, Encoding) or self.front_end.encoder.projected
                fields = fields_of(modality, rows, projected, kept.newlines, kept.placeholders)
                for name, value in (metadata | fields).items():
                    batch[name] = joined(batch.get(name), value)
        return BatchFeature(batch)

    def source(
        self, mm_items: Any, modality: str, index: int, hf_kwargs: Mapping[str, Any]
    ) -> tuple[Mapping[str, Any] | Encoding, dict[str, Any]]:
        """What is to be pruned of one item: what the encoder is fed with, or embeddings that the client made. And what
        the engine is told about the item besides: whatever vLLM keeps on the CPU."""
        assert self.front_end
        of_each = mm_items[modality]
        if isinstance(of_each, EmbeddingItems | DictEmbeddingItems):
            fields = super()._get_mm_fields_config(BatchFeature(dict(of_each.get_passthrough_data())), hf_kwargs)
            inputs = embeddings_of(of_each, index, fields)
        else:
            alone = self.info.parse_mm_data({modality: [of_each[index]]}, validate=False)
            own = super()._get_cache_missing_processor_kwargs(
                ProcessorInputs([], mm_items, hf_processor_mm_kwargs=hf_kwargs),
                {modality: [other != index for other in range(len(of_each))]},
            )
            inputs = super()._apply_hf_processor_main(alone, own)
            fields = super()._get_mm_fields_config(inputs, own)
        metadata = {name: inputs[name] for name in fields.keys() & inputs.keys() if fields[name].field.keep_on_cpu}
        embeddings = inputs.get(f"{modality}_embeds")
        return inputs if embeddings is None else self.front_end.encoder.embedded(embeddings, inputs), metadata

    def warm_up(self) -> None:
        """Encode a blank image, so that the first request does not pay for what is set up once."""
        assert self.front_end
        if self.info.ctx.get_mm_config().get_limit_per_prompt("image"):
            mm_items = self.info.parse_mm_data({"image": [Image.new("RGB", (56, 56))]})
            self.front_end.warm_up(self.source(mm_items, "image", 0, {})[0])

    def view(self, item: Any, count: int, number: int) -> Image.Image:
        """What one of ``count`` grids lies over: the image each time, or the frames of a video at equal distances."""
        if isinstance(item, Image.Image):
            return item
        frames = item[0] if isinstance(item, tuple) else item
        return Image.fromarray(frames[len(frames) * number // count])

    @override
    def _get_mm_fields_config(self, *args: Any) -> Mapping[str, MultiModalFieldConfig]:
        fields = dict(super()._get_mm_fields_config(*args))
        for modality in MODALITIES:
            fields |= {modality + name: MultiModalFieldConfig.batched(modality) for name in (ROWS, FEATURES, NEWLINES)}
            fields[modality + KEPT] = MultiModalFieldConfig.batched(modality, keep_on_cpu=True)
        return fields

    @override
    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: MultiModalKwargsItems
    ) -> Sequence[PromptUpdate]:
        items, others = split(hf_processor_mm_kwargs)

        def pruned(update: PromptUpdate) -> PromptUpdate:
            def replacement(item_idx: int) -> PrunedDetails:
                unpruned = update.replacement(item_idx)
                if not isinstance(unpruned, PromptUpdateDetails):
                    unpruned = PromptUpdateDetails(unpruned)
                full = torch.tensor(unpruned.full)
                embeds = unpruned.is_embed(unpruned.full) if unpruned.is_embed else torch.ones_like(full).bool()
                kept = items.kept[update.modality][item_idx]
                if embeds.sum() != kept.unpruned:
                    raise VLLMServerError(f"{kept.unpruned} tokens were encoded where vLLM expects {embeds.sum()}")
                stays = ~embeds
                stays[embeds.nonzero()[:, 0][kept.placeholders]] = True
                report = report_of(kept, items.options[update.modality][item_idx])
                digest = hashlib.blake2b(kept.placeholders.numpy().data, digest_size=8).hexdigest()
                skipped = kept.extent - len(kept)
                return PrunedDetails(full[stays].tolist(), unpruned.is_embed, report, skipped, digest)

            return replace(update, replacement=replacement)

        return [pruned(update) for update in super()._get_prompt_updates(mm_items, others, out_mm_kwargs)]

    @override
    def get_dummy_mm_inputs(self, mm_counts: Mapping[str, int], **_: Any) -> Any:
        model_config = self.info.ctx.model_config
        encoder = encoder_class(model_config.architecture)
        lengths = self.info.get_mm_max_tokens_per_item(model_config.max_model_len, mm_counts)
        batch: dict[str, Any] = {}
        placeholders: dict[str, list[PlaceholderRange]] = {}
        end = 0
        for modality, count in mm_counts.items():
            length = lengths[modality]
            rows = torch.zeros(length, encoder.row_width(model_config.hf_config), dtype=model_config.dtype)
            newlines = torch.zeros(length, dtype=torch.bool)
            fields = fields_of(modality, rows, encoder.projected, newlines, torch.arange(length))
            batch |= {name: value * count for name, value in fields.items()}
            placeholders[modality] = [PlaceholderRange(end + number * length, length) for number in range(count)]
            end += count * length
        return {
            "type": "multimodal",
            "prompt_token_ids": [0] * end,
            "mm_kwargs": MultiModalKwargsItems.from_hf_inputs(
                BatchFeature(batch), self._get_mm_fields_config(BatchFeature(batch), {})
            ),
            "mm_hashes": {
                modality: [f"{KEY}-dummy-{modality}-{number}" for number in range(count)]
                for modality, count in mm_counts.items()
            },
            "mm_placeholders": placeholders,
        }
