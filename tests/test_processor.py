"""The processor half of an adapter, with vLLM's own processor of the embedded model, and no engine."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from PIL import Image
from prometheus_client import CollectorRegistry
from samples import decided, explained
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models.llava import LlavaMultiModalProcessor
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import BaseMultiModalProcessor, PromptUpdateDetails, TimingContext
from vllm.multimodal.processing.inputs import ProcessorInputs

from eadaprune_vllm.architectures import adapter
from eadaprune_vllm.core.item_report import ItemReport
from eadaprune_vllm.core.options import KEY, PruneOptions
from eadaprune_vllm.core.server_options import Choice, ServerOptions
from eadaprune_vllm.frontend import preview
from eadaprune_vllm.frontend.client import DecisionClient
from eadaprune_vllm.frontend.front_end import FrontEnd
from eadaprune_vllm.frontend.metrics import Metrics
from eadaprune_vllm.frontend.processor import PruningProcessor
from eadaprune_vllm.frontend.request_options import Choices
from eadaprune_vllm.frontend.transfer import TRANSFER, Transfer

Images = dict[str, Image.Image]
Family = Callable[[str], Path]
# The report of an image of ten tokens.
SMALL: dict[str, Any] = {"visual_tokens": 10, "kept_tokens": 1, "energy_threshold": 0.9, "energy_requested": 0.9}
SMALL |= {"spectral_energy": 0.9, "span_energy": 0.9, "selector": "span"}
LEAST, MAX_MODEL_LEN = 64, 150  # tokens that an image keeps at least, and that a prompt has at most


class Numbering(BaseMultiModalProcessor):  # type: ignore[misc]
    """As of models in whose prompts images are numbered."""

    def _get_prompt_updates(self, *args: Any) -> Any:
        (update,) = super()._get_prompt_updates(*args)
        of = update.replacement
        return [replace(update, replacement=lambda index: self._numbered(index, of(index)))]

    def _recompute_cached_prompt_update(self, cached_update: Any, new_item_idx: int) -> Any:
        update = super()._recompute_cached_prompt_update(cached_update, new_item_idx)
        return update.with_content(self._numbered(new_item_idx, cached_update.content.full[1:]))

    def _numbered(self, index: int, tokens: Any) -> PromptUpdateDetails:
        return PromptUpdateDetails.select_token_id([index, *tokens], tokens[0])


def build(model: Path, flags: dict[str, Any] | None = None, **changes: Any) -> PruningProcessor:
    """That of our class for a model, with changes to what makes it."""
    limits = {"image": 4}
    config = EngineArgs(
        str(model), max_model_len=MAX_MODEL_LEN, limit_mm_per_prompt=limits, **flags or {}
    ).create_model_config()
    setattr(config.get_multimodal_config(), KEY, ServerOptions(energy=0.5, min_share=0, min_tokens=LEAST))
    context = MULTIMODAL_REGISTRY._create_processing_ctx(config)
    factory = replace(adapter(config.architecture)._processor_factory, **changes)
    made: PruningProcessor = factory.build_processor(context)
    made.front_end = FrontEnd(DecisionClient(max_encoder_tokens=10_000), Metrics(CollectorRegistry()), "m", 1)
    return made


@pytest.fixture
def processor(model: Path) -> PruningProcessor:
    return build(model)


def inputs(processor: PruningProcessor, options: Any, *images: Image.Image) -> ProcessorInputs:
    """A prompt of these images, with the options of a request."""
    tokens = [processor.info.get_hf_config().image_token_index] * len(images)
    parsed = processor.info.parse_mm_data({"image": list(images)})
    return ProcessorInputs(tokens, parsed, hf_processor_mm_kwargs={KEY: options})


def apply(processor: PruningProcessor, options: Any, *images: Image.Image) -> Any:
    """The steps of a request."""
    return processor.apply(inputs(processor, options, *images), TimingContext(enabled=False))


def made_by(steps: Any) -> Any:
    """What the last step makes."""
    with pytest.raises(StopIteration) as last:
        next(steps)
    return last.value.value


def test_question_becomes_a_prompt(processor: PruningProcessor, images: Images) -> None:
    steps = apply(processor, {"energy": 0.25}, images["coffee"], images["moon"])
    asked = next(steps)
    assert [(each.request.modality, each.request.num_placeholders) for each in asked] == [("image", 576)] * 2
    for each, k in zip(asked, (2, 3), strict=True):
        each.set_response(decided(k))
    made = made_by(steps)
    assert [place.length for place in made["mm_placeholders"]["image"]] == [2, 3]
    assert len(made["prompt_token_ids"]) == 5
    assert [report.kept_tokens for report in made[KEY].of("image")] == [2, 3]


def test_images_of_a_prompt_are_numbered_where_a_model_wants_that(model: Path, images: Images) -> None:
    numbered = type("NumberedProcessor", (PruningProcessor, Numbering, LlavaMultiModalProcessor), {})
    processor = build(model, processor=numbered)
    steps = apply(processor, {}, images["coffee"], images["moon"])
    for each in next(steps):
        each.set_response(decided(2))
    made = made_by(steps)
    image = processor.info.get_hf_config().image_token_index
    assert made["prompt_token_ids"] == [0, image, image, 1, image, image]
    assert [report.kept_tokens for report in made[KEY].of("image")] == [2, 2]


@pytest.mark.parametrize("before", [[40], [13, 40]])
def test_tokens_already_in_the_prompt_are_replaced(family: Family, images: Images, before: list[int]) -> None:
    """So that a prompt may be longer than the model takes before it is pruned, but not after. One that was cut on the
    left may begin with the end of another image."""
    processor = build(family("pixtral"))
    text, image, line_break, end = 40, 10, 12, 13
    whole = [*before, *([image] * 12 + [line_break]) * 11, *[image] * 12, end, text]
    assert len(whole) > MAX_MODEL_LEN
    pictures = processor.info.parse_mm_data({"image": [images["astronaut"]]})
    given = ProcessorInputs(whole, pictures, hf_processor_mm_kwargs={KEY: {}})
    steps = processor.apply(given, TimingContext(enabled=False))
    (asked,) = next(steps)
    asked.set_response(decided(2))
    made = made_by(steps)
    assert made["prompt_token_ids"] == [*before, image, image, *[line_break] * 11, end, text]


def test_items_that_keep_everything_need_no_decision(processor: PruningProcessor, images: Images) -> None:
    made = made_by(apply(processor, {"energy": 1.0}, images["coffee"]))
    assert [place.length for place in made["mm_placeholders"]["image"]] == [576]
    assert "pixel_values" in made["mm_kwargs"]["image"][0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e6])
@pytest.mark.parametrize("options", [{}, {"energy": 1.0}, {"enabled": False}])
@pytest.mark.parametrize(("name", "modality"), [("llava", "image"), ("qwen2_5_vl", "image"), ("qwen2_5_vl", "video")])
def test_embeddings_that_are_not_finite_are_refused(
    model: Path, family: Family, name: str, modality: str, options: Any, value: float
) -> None:
    """Also where nothing may be pruned, and what is too large for the model's dtype."""
    processor = build(
        model if name == "llava" else family(name), flags={"enable_mm_embeds": True, "dtype": torch.float16}
    )
    rows = torch.ones(2, 4, processor.info.ctx.model_config.get_inputs_embeds_size())
    rows[1, 2, 3] = value
    data: Any = rows
    if name != "llava":
        data = {f"{modality}_embeds": rows.flatten(0, 1), f"{modality}_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
        data |= {"second_per_grid_ts": torch.ones(2)} if modality == "video" else {}
    given = ProcessorInputs([], processor.info.parse_mm_data({modality: data}), hf_processor_mm_kwargs={KEY: options})
    with pytest.raises(VLLMValidationError, match=f"embeddings of {modality} 1 hold NaN, infinity or values too large"):
        next(processor.apply(given, TimingContext(enabled=False)))


def test_embeddings_without_layout_are_refused_per_request(family: Family) -> None:
    """Where vLLM takes embeddings without being asked to, as with a store of blocks."""
    processor = build(family("llava_next"), flags={"enable_mm_embeds": True})
    rows = torch.ones(1, 4, processor.info.ctx.model_config.get_inputs_embeds_size())
    for options in ({}, {"energy": 1.0}):
        given = ProcessorInputs(
            [], processor.info.parse_mm_data({"image": rows}), hf_processor_mm_kwargs={KEY: options}
        )
        with pytest.raises(VLLMValidationError, match="embeddings of images are not supported for this model"):
            next(processor.apply(given, TimingContext(enabled=False)))


def test_missing_embeddings_are_refused(family: Family) -> None:
    """vLLM lets consumers of KV cache send the layout alone."""
    processor = build(family("qwen2_5_vl"), flags={"enable_mm_embeds": True})
    processor.info.ctx.get_mm_config().allow_missing_mm_embeddings = True
    layout = processor.info.get_data_parser().parse_mm_data({"image": {"image_grid_thw": torch.tensor([[1, 4, 4]])}})
    given = ProcessorInputs([], layout, hf_processor_mm_kwargs={KEY: {}})
    with pytest.raises(VLLMValidationError, match="embeddings of image 0 are missing"):
        next(processor.apply(given, TimingContext(enabled=False)))


def transferred(processor: PruningProcessor, image: Image.Image, k: int, **changes: Any) -> Transfer:
    """What another instance decided about an image: to keep the first k tokens."""
    steps = apply(processor, {"energy": 0.25}, image)
    (asked,) = next(steps)
    result = decided(k)
    asked.set_response(msgspec.structs.replace(result, decision=replace(result.decision, unpruned=576)))
    (item,) = made_by(steps)[KEY].decisions["image"]
    return Transfer({"image": [item.model_copy(update=changes)]})


def load(processor: PruningProcessor, transfer: Transfer, *images: Image.Image) -> Any:
    """The steps of a request whose KV cache comes from another instance."""
    given = inputs(processor, {"energy": 0.9}, *images)
    given.hf_processor_mm_kwargs = {**given.hf_processor_mm_kwargs, TRANSFER: transfer}
    return processor.apply(given, TimingContext(enabled=False))


def test_decisions_of_another_instance_hold(model: Path, images: Images) -> None:
    """Nothing is decided, whatever the options here; the item has its pixels, if it has to be encoded."""
    transfer = transferred(build(model), images["coffee"], 3)
    made = made_by(load(build(model), transfer, images["coffee"]))
    (place,), (item,) = made["mm_placeholders"]["image"], made["mm_kwargs"]["image"]
    assert place.length == len(made["prompt_token_ids"]) == 3
    assert item["image_kept"].data.tolist() == [0, 1, 2]
    assert item["pixel_values"].data.shape == (3, 336, 336)
    assert made[KEY].decisions == transfer.prefilled
    (report,) = made[KEY].of("image")
    assert transfer.prefilled
    assert report == transfer.prefilled["image"][0].report.model_copy(update={"cached": False})


def test_decisions_that_do_not_fit_are_refused(model: Path, processor: PruningProcessor, images: Images) -> None:
    coffee, report = images["coffee"], ItemReport.model_validate(SMALL)
    transfer = transferred(build(model), coffee, 3)
    of_another_size = transferred(build(model), coffee, 3, kept="gAA=", report=report)
    for there, pictures, words in (
        (transfer, [images["moon"]], "is about another image"),
        (transfer, [coffee, images["moon"]], "has no decision about image 1"),
        (of_another_size, [coffee], "decided about 10 tokens where this image has 576"),
    ):
        with pytest.raises(VLLMValidationError, match=words):
            next(load(processor, there, *pictures))


def test_image_of_two_requests_is_processed_once(processor: PruningProcessor, images: Images) -> None:
    first, second, other = (next(apply(processor, options, images["coffee"])) for options in ({}, {}, {"energy": 0.25}))
    assert first == second != other


def test_one_step_reads_at_most_one_batch(processor: PruningProcessor, images: Images) -> None:
    assert processor.front_end
    processor.front_end.decision_client.max_batch_tokens = 576
    steps = apply(processor, {}, images["coffee"], images["moon"])
    for _ in range(2):
        (asked,) = next(steps)
        asked.set_response(decided(2))
    assert len(made_by(steps)["prompt_token_ids"]) == 4


def test_new_weights_restart_processing(processor: PruningProcessor, images: Images) -> None:
    """Neither to the request that asked about it, nor to others with the same image."""
    assert processor.front_end
    first, second, third = (apply(processor, {}, images["coffee"]) for _ in range(3))
    ((old,), (same,)) = next(first), next(second)
    assert old is same
    old.set_response(decided(2))
    before = made_by(first)[KEY].identifiers
    processor.front_end.weights_changed()
    (new,) = next(second)
    assert new is not old
    assert next(third) == [new]
    new.set_response(decided(2))
    # Though it keeps the same, the engine's caches take it for another.
    after = made_by(second)[KEY].identifiers
    assert not {*before.values()} & {*after.values()}


def test_too_long_prompts_are_rejected_before_a_decision(processor: PruningProcessor, images: Images) -> None:
    """Nor shown: each keeps 64 tokens at least, and there is room for 150."""
    three = [images[name] for name in ("coffee", "moon", "rocket")]
    assert len(next(apply(processor, {}, *three[:2]))) == 2
    with pytest.raises(VLLMValidationError, match="length is 150 tokens, and this request has at least 192, even"):
        next(apply(processor, {}, *three))
    for each in (three, three[:1] * 3):
        choices = Choices({"image": (Choice(processor.server_options.defaults),) * 3})
        items = preview.iter_preview_items(processor, {"image": each}, choices)
        assert [next(items).pending.needs_decision for _ in range(2)] == [True] * 2
        with pytest.raises(VLLMValidationError, match="at least 192, even"):
            next(items)


def test_equal_images_of_a_preview_are_read_and_drawn_once(processor: PruningProcessor, images: Images) -> None:
    """Under equal options. A few bytes each are all that they take of a request."""
    other, asked = processor.server_options.defaults, PruneOptions(energy=0.5, min_share=0, min_tokens=1, max_tokens=1)
    given = [(images[name].copy(), asked) for name in ("coffee", "moon", "coffee")] + [(images["coffee"], other)]
    choices = Choices({"image": tuple(Choice(options) for _, options in given)})
    items = [*preview.iter_preview_items(processor, {"image": [image for image, _ in given]}, choices)]
    coffee, moon, again = dict.fromkeys(items)
    assert items == [coffee, moon, coffee, again]
    for item in (coffee, moon, again):
        item.pending.set_response(explained())
    found = preview.previews(processor, items, overlay=True, spectrum=True)
    reports = found.of("image")
    assert [report.kept_tokens for report in reports] == [2] * 4
    assert reports[0] is reports[2]
    assert found.seconds == 3 * 0.25
