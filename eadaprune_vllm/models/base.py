"""What every adapter shares: the processor half, which prunes, and the model half, which has no tower.

Invariant: count and content come from one object. ``FrontEnd.prune`` decides once; the rows, the placeholders and
the report of an image are all made from that decision, and travel with its cache entry.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from transformers import BatchFeature
from vllm.exceptions import VLLMServerError, VLLMValidationError
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems, PlaceholderRange
from vllm.multimodal.processing import BaseMultiModalProcessor, PromptUpdate, PromptUpdateDetails
from vllm.multimodal.processing.inputs import ProcessorInputs

from eadaprune_vllm.errors import InvalidOptionsError, NonFiniteFeaturesError
from eadaprune_vllm.front_end import FrontEnd
from eadaprune_vllm.metrics import ImageReport
from eadaprune_vllm.options import KEY, PruneOptions, resolve

# Fields of one image on their way to the engine. Only the rows are for the model.
ROWS = "image_features"  # [k, D], the model's dtype
INDICES = "kept_indices"  # [k] int64, on the CPU
ENERGY = "energy_kept"  # [] float64, on the CPU


@dataclass
class PrunedDetails(PromptUpdateDetails):
    """Placeholders of one image, with the report that a cache hit repeats."""

    report: ImageReport | None = None


@dataclass
class PrunedInputs(ProcessorInputs):
    """Processor inputs whose images' reports are filled in on the way."""

    reports: list[ImageReport] = field(default_factory=list)


class PruningProcessor(BaseMultiModalProcessor):
    """Mixin in front of a model's multimodal processor.

    Modifications:
    - resolved options are part of every cache key, as one canonical string
    - ships the kept feature rows in place of pixels
    - as many placeholders as rows
    - dummy inputs are zero rows of the full size; they never need the tower
    """

    front_end: FrontEnd | None = None  # set in front-end processes only

    def resolve(self, override: object) -> PruneOptions:
        """The server's options with a request's on top; a bad one is vLLM's 400."""
        defaults: PruneOptions = getattr(self.info.ctx.get_mm_config(), KEY)
        try:
            return resolve(defaults, override, where=f"mm_processor_kwargs.{KEY}")
        except InvalidOptionsError as error:
            assert self.front_end
            self.front_end.reject("options")
            raise VLLMValidationError(str(error), parameter=error.field) from None

    def apply(self, inputs: ProcessorInputs, *args: Any, **kwargs: Any) -> Any:
        options = self.resolve(inputs.hf_processor_mm_kwargs.get(KEY))
        pruned = PrunedInputs(**{f.name: getattr(inputs, f.name) for f in fields(ProcessorInputs)})
        pruned.hf_processor_mm_kwargs = {**inputs.hf_processor_mm_kwargs, KEY: options.key}
        result = super().apply(pruned, *args, **kwargs)
        result[KEY] = pruned.reports
        return result

    def _cached_apply_hf_processor(self, inputs: PrunedInputs, *args: Any, **kwargs: Any) -> Any:
        result = super()._cached_apply_hf_processor(inputs, *args, **kwargs)
        inputs.reports = [
            update.content.report for items in result.prompt_updates.values() for updates in items for update in updates
        ]
        return result

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]) -> BatchFeature:
        assert self.front_end, "images are encoded in front-end processes only"
        options, hf_kwargs = _split(hf_kwargs)
        batch: dict[str, list[torch.Tensor]] = {ROWS: [], INDICES: [], ENERGY: []}
        for image in hf_data["images"]:
            # One image per call, here as in the encoder: what comes out must not depend on its neighbours.
            pixels = super()._call_hf_processor({**hf_data, "images": [image]}, hf_kwargs)["pixel_values"]
            try:
                rows, kept = self.front_end.prune(pixels, options)
            except NonFiniteFeaturesError as error:
                raise VLLMServerError(str(error)) from None
            batch[ROWS].append(rows)
            batch[INDICES].append(kept.indices)
            batch[ENERGY].append(torch.tensor(kept.energy, dtype=torch.float64))
        return BatchFeature(batch)

    def _get_mm_fields_config(self, *_: Any) -> Mapping[str, MultiModalFieldConfig]:
        return {
            ROWS: MultiModalFieldConfig.batched("image"),
            INDICES: MultiModalFieldConfig.batched("image", keep_on_cpu=True),
            ENERGY: MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        }

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: MultiModalKwargsItems
    ) -> Sequence[PromptUpdate]:
        options, hf_kwargs = _split(hf_processor_mm_kwargs)

        def pruned(update: PromptUpdate) -> PromptUpdate:
            def replacement(item_idx: int) -> PrunedDetails:
                unpruned: list[int] = update.replacement(item_idx)
                item = out_mm_kwargs[update.modality][item_idx].get_data()
                kept = item[INDICES].tolist()
                report = ImageReport(
                    visual_tokens=len(unpruned),
                    kept_tokens=len(kept),
                    energy_threshold=options.energy if options.enabled else 1.0,
                    energy_kept=float(item[ENERGY]),
                    selector=options.selector,
                )
                return PrunedDetails(full=[unpruned[index] for index in kept], report=report)

            return replace(update, replacement=replacement)

        return [pruned(update) for update in super()._get_prompt_updates(mm_items, hf_kwargs, out_mm_kwargs)]

    def get_dummy_mm_inputs(self, mm_counts: Mapping[str, int], **_: Any) -> Any:
        config = self.info.get_hf_config()
        count, num_tokens = mm_counts.get("image", 0), self.info.get_max_image_tokens()
        rows = torch.zeros(num_tokens, config.vision_config.hidden_size, dtype=self.info.ctx.model_config.dtype)
        batch = {
            ROWS: [rows] * count,
            INDICES: [torch.arange(num_tokens)] * count,
            ENERGY: [torch.ones((), dtype=torch.float64)] * count,
        }
        return {
            "type": "multimodal",
            "prompt_token_ids": [config.image_token_index] * (num_tokens * count),
            "mm_kwargs": MultiModalKwargsItems.from_hf_inputs(BatchFeature(batch), self._get_mm_fields_config()),
            "mm_hashes": {"image": [f"{KEY}-dummy-{index}" for index in range(count)]},
            "mm_placeholders": {
                "image": [PlaceholderRange(offset=index * num_tokens, length=num_tokens) for index in range(count)]
            },
        }


def _split(hf_kwargs: Mapping[str, Any]) -> tuple[PruneOptions, dict[str, Any]]:
    """Our resolved options, and what is left for vLLM, which must never see them."""
    others = dict(hf_kwargs)
    return PruneOptions.model_validate_json(others.pop(KEY)), others


@contextmanager
def no_tower(module: Any, builder: str) -> Iterator[None]:
    """While open, the function ``builder`` of a vLLM model's module builds nothing.

    Lets a subclass call the model's own ``__init__`` instead of repeating it.
    """
    original = getattr(module, builder)
    setattr(module, builder, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        setattr(module, builder, original)
