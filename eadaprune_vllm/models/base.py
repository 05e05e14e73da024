"""What every adapter shares: the processor half, which prunes, and the model half, which has no tower.

Invariant: count and content come from one object. ``FrontEnd.prune`` decides once; the rows, the placeholders and
the report of an image are all made from that decision, and travel with its cache entry.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import BatchFeature
from vllm.exceptions import VLLMServerError, VLLMValidationError
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems, PlaceholderRange
from vllm.multimodal.processing import BaseMultiModalProcessor, PromptUpdate, PromptUpdateDetails
from vllm.multimodal.processing.inputs import ProcessorInputs

from eadaprune_vllm import draw
from eadaprune_vllm.errors import NonFiniteFeaturesError
from eadaprune_vllm.front_end import FrontEnd
from eadaprune_vllm.options import KEY, PruneOptions, ServerOptions
from eadaprune_vllm.report import ImagePreview, ImageReport, Pruning
from eadaprune_vllm.request import RequestContext, refusals, request_layers

# Fields of one image on their way to the engine. Only the rows are for the model.
ROWS = "image_features"  # [k, D], the model's dtype
INDICES = "kept_indices"  # [k] int64, on the CPU
ENERGY = "energy_kept"  # [] float64, on the CPU


@dataclass
class PrunedDetails(PromptUpdateDetails):
    """Placeholders of one image, with the report that a cache hit repeats."""

    report: ImageReport | None = None


@dataclass
class Images:
    """The images of one request on their way through the processor.

    Attributes:
        options: of each image, resolved.
        cached: whether vLLM's processor cache has it.
        seconds: how long it took to prune each of the others.
        reports: one per image, once they are known.
    """

    options: tuple[PruneOptions, ...]
    cached: list[bool]
    seconds: list[float] = field(default_factory=list)
    reports: list[ImageReport] = field(default_factory=list)


class PruningProcessor(BaseMultiModalProcessor):
    """Mixin in front of a model's multimodal processor.

    Modifications:
    - an image's resolved options are part of its cache key, as one canonical string
    - ships the kept feature rows in place of pixels
    - as many placeholders as rows
    - dummy inputs are zero rows of the full size; they never need the tower
    """

    front_end: FrontEnd | None = None  # set in front-end processes only

    @property
    def server_options(self) -> ServerOptions:
        options: ServerOptions = getattr(self.info.ctx.get_mm_config(), KEY)
        return options

    def apply(self, inputs: ProcessorInputs, *args: Any, **kwargs: Any) -> Any:
        assert self.front_end, "images are encoded in front-end processes only"
        count = inputs.mm_data_items.get_count("image", strict=False)
        options = inputs.hf_processor_mm_kwargs.get(KEY)
        if not isinstance(options, tuple):  # no chat messages: a prompt of LLM.generate, or of raw tokens over HTTP
            with refusals(self.front_end):
                layers = request_layers(RequestContext(), inputs.hf_processor_mm_kwargs)
                options = (self.server_options.resolve(*layers),) * count
        if len(options) != count:
            raise VLLMServerError(f"{len(options)} sets of pruning options for {count} images")
        images = Images(options, [False] * count)
        kwargs_with_images = {**inputs.hf_processor_mm_kwargs, KEY: images}
        result = super().apply(replace(inputs, hf_processor_mm_kwargs=kwargs_with_images), *args, **kwargs)
        result[KEY] = Pruning(images.reports, sum(images.seconds), self.front_end.kv_bytes_per_token)
        return result

    def _cached_apply_hf_processor(self, inputs: ProcessorInputs, *args: Any, **kwargs: Any) -> Any:
        result = super()._cached_apply_hf_processor(inputs, *args, **kwargs)
        images, _ = _split(inputs.hf_processor_mm_kwargs)
        updates = [update.content.report for updates in result.prompt_updates.get("image", []) for update in updates]
        images.reports = [
            report.model_copy(update={"cached": cached}) for report, cached in zip(updates, images.cached, strict=True)
        ]
        return result

    def _get_mm_hashes(self, inputs: ProcessorInputs) -> Any:
        images, others = _split(inputs.hf_processor_mm_kwargs)
        hashes = super()._get_mm_hashes(replace(inputs, hf_processor_mm_kwargs=others))
        if images.options:
            algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
            hashes["image"] = [
                MultiModalHasher.hash_kwargs(algorithm, image=image, **{KEY: options.key})
                for image, options in zip(hashes["image"], images.options, strict=True)
            ]
        return hashes

    def _get_cache_missing_items(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._get_cache_missing_items(*args, **kwargs)
        except ValueError as error:
            if "data is not provided" not in str(error):
                raise
            raise VLLMValidationError(
                f"{error} An image sent by its uuid alone must have been sent before, under the same pruning options.",
                parameter="messages",
            ) from None

    def _get_cache_missing_processor_kwargs(self, inputs: ProcessorInputs, mm_is_cached: Any) -> Mapping[str, Any]:
        images, others = _split(inputs.hf_processor_mm_kwargs)
        images.cached = mm_is_cached.get("image", images.cached)
        missing = [options for options, cached in zip(images.options, images.cached, strict=True) if not cached]
        return others | {KEY: replace(images, options=tuple(missing))}

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]) -> BatchFeature:
        assert self.front_end
        images, hf_kwargs = _split(hf_kwargs)
        batch: dict[str, list[torch.Tensor]] = {ROWS: [], INDICES: [], ENERGY: []}
        for image, options in zip(hf_data["images"], images.options, strict=True):
            # One image per call, here as in the encoder: what comes out must not depend on its neighbours.
            pixels = self._pixels({**hf_data, "images": [image]}, hf_kwargs)
            start = time.perf_counter()
            with _server_errors():
                rows, kept = self.front_end.prune(pixels, options)
            images.seconds.append(time.perf_counter() - start)
            batch[ROWS].append(rows)
            batch[INDICES].append(kept.indices)
            batch[ENERGY].append(torch.tensor(kept.energy, dtype=torch.float64))
        return BatchFeature(batch)

    def _pixels(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]) -> torch.Tensor:
        pixels: torch.Tensor = super()._call_hf_processor(hf_data, hf_kwargs)["pixel_values"]
        return pixels

    def preview(self, images: Sequence[Any], options: Sequence[PruneOptions], overlay: bool) -> Pruning:
        """What pruning makes of images that are not part of a prompt.

        Args:
            images: as vLLM fetches them.
            options: resolved, of each image.
            overlay: whether to draw what is kept.

        Raises:
            VLLMServerError: if the features of an image are not finite.
        """
        assert self.front_end
        previews, start = [], time.perf_counter()
        for image, chosen in zip(images, options, strict=True):
            items = self.info.parse_mm_data({"image": [image]})
            hf_data, hf_kwargs, _ = self._get_hf_mm_inputs(items, {})
            with _server_errors():
                kept, spectrum = self.front_end.preview(self._pixels(hf_data, hf_kwargs), chosen)
            picture = None
            if overlay:
                tower_sees = draw.seen(self.info.get_hf_processor().image_processor, hf_data["images"][0])
                grid = self.front_end.encoder.spec.grid
                picture = draw.data_url(draw.dim_pruned(tower_sees, kept.indices.tolist(), grid))
            report = _report(kept.num_tokens, len(kept), kept.energy, chosen)
            previews.append(ImagePreview(**report.model_dump(), curve=spectrum.curve(), overlay=picture))
        return Pruning(previews, time.perf_counter() - start, self.front_end.kv_bytes_per_token)

    def _get_mm_fields_config(self, *_: Any) -> Mapping[str, MultiModalFieldConfig]:
        return {
            ROWS: MultiModalFieldConfig.batched("image"),
            INDICES: MultiModalFieldConfig.batched("image", keep_on_cpu=True),
            ENERGY: MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        }

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: MultiModalKwargsItems
    ) -> Sequence[PromptUpdate]:
        images, hf_kwargs = _split(hf_processor_mm_kwargs)

        def pruned(update: PromptUpdate) -> PromptUpdate:
            def replacement(item_idx: int) -> PrunedDetails:
                unpruned: list[int] = update.replacement(item_idx)
                item = out_mm_kwargs[update.modality][item_idx].get_data()
                kept = item[INDICES].tolist()
                report = _report(len(unpruned), len(kept), float(item[ENERGY]), images.options[item_idx])
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


def _report(visual_tokens: int, kept_tokens: int, energy: float, options: PruneOptions) -> ImageReport:
    return ImageReport(
        visual_tokens=visual_tokens,
        kept_tokens=kept_tokens,
        energy_threshold=options.threshold,
        energy_kept=energy,
        selector=options.selector,
    )


@contextmanager
def _server_errors() -> Iterator[None]:
    """While open, features that cannot be pruned fail the request, not the server."""
    try:
        yield
    except NonFiniteFeaturesError as error:
        raise VLLMServerError(str(error)) from None


def _split(hf_kwargs: Mapping[str, Any]) -> tuple[Images, dict[str, Any]]:
    """Our images, and what is left for vLLM, which must never see them."""
    others = dict(hf_kwargs)
    return others.pop(KEY), others


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
