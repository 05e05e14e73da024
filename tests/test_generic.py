"""Adapters that are made of vLLM's classes by the name of the architecture, and which models they are not for."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs

from eadaprune_vllm.architectures import ARCHITECTURES, adapter
from eadaprune_vllm.core.layout import Layout
from eadaprune_vllm.errors import StartupError
from eadaprune_vllm.frontend.processor import PruningProcessor
from eadaprune_vllm.models import generic
from eadaprune_vllm.startup import checks


def layout(num_placeholders: int, modality: str = "image", **data: Any) -> Layout:
    return generic.EmbedPerPlaceholder.eadaprune_layout(None, modality, data, num_placeholders)


def test_our_classes_are_in_front_of_vllms() -> None:
    ours = adapter("Gemma3ForConditionalGeneration")
    from vllm.model_executor.models.gemma3_mm import Gemma3ForConditionalGeneration, Gemma3MultiModalProcessor

    assert ours is adapter("Gemma3ForConditionalGeneration")
    assert issubclass(ours, generic.EmbedPerPlaceholder)
    assert issubclass(ours, Gemma3ForConditionalGeneration)
    made, stock = ours._processor_factory, Gemma3ForConditionalGeneration._processor_factory
    assert issubclass(made.processor, PruningProcessor)
    assert issubclass(made.processor, Gemma3MultiModalProcessor)
    assert (made.info, made.dummy_inputs) == (stock.info, stock.dummy_inputs)
    assert stock.processor is Gemma3MultiModalProcessor
    assert sys.modules[ours.__module__] is sys.modules[made.processor.__module__] is generic


def test_generic_ocr_models_keep_everything_by_default() -> None:
    assert generic.LightOnOCRForConditionalGeneration.eadaprune_energy == 1.0
    assert generic.Gemma3ForConditionalGeneration.eadaprune_energy is None


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "__path__", "Nothing"])
def test_unknown_architectures_have_no_generic_class(name: str) -> None:
    assert not hasattr(generic, name)


@pytest.mark.parametrize(
    ("num_placeholders", "pixels", "grid"),
    [
        (16, (3, 112, 112), (4, 4)),
        (16, (1, 3, 112, 112), (4, 4)),
        (6, (3, 56, 84), (2, 3)),
        (6, (3, 84, 56), (3, 2)),
        (17, (3, 112, 112), (1, 17)),
        (6, (3, 112, 112), (1, 6)),
        (16, (64, 588), (1, 16)),
        (16, None, (1, 16)),
    ],
)
def test_a_picture_has_one_part_and_if_tokens_fill_it_its_grid(
    num_placeholders: int, pixels: tuple[int, ...] | None, grid: tuple[int, int]
) -> None:
    data: dict[str, Any] = {"pixel_values": torch.zeros(pixels)} if pixels else {}
    found = layout(num_placeholders, **data)
    assert found.part.tolist() == [0] * num_placeholders
    assert found.grids == (grid,)
    assert not found.is_newline.any()


def test_tiles_are_parts() -> None:
    found = layout(48, pixel_values_flat=torch.zeros(3, 3, 112, 112))
    assert found.part.tolist() == [0] * 16 + [1] * 16 + [2] * 16
    assert found.grids == ((1, 48),)
    assert torch.unique(layout(50, pixel_values=torch.zeros(3, 3, 112, 112)).part).numel() == 1


def test_frames_are_parts_and_have_grids() -> None:
    found = layout(32, "video", pixel_values_videos=torch.zeros(2, 3, 112, 112))
    assert found.part.tolist() == [0] * 16 + [1] * 16
    assert found.grids == ((4, 4),) * 2
    flat = layout(32, "video", pixel_values_videos=torch.zeros(2, 64, 588))
    assert flat.part.tolist() == found.part.tolist()
    assert flat.grids == ((1, 32),)


@pytest.fixture
def config(family: Callable[[str], Path]) -> Any:
    return EngineArgs(str(family("gemma3")), max_model_len=1024).create_engine_config()


def test_embeddings_are_refused(config: Any) -> None:
    checks.check(config)
    config.model_config.multimodal_config.enable_mm_embeds = True
    with pytest.raises(StartupError, match="--enable-mm-embeds is not supported for this model"):
        checks.check(config)


def test_processors_that_fill_prompts_themselves_are_refused(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = f"{generic.__name__}:DeepseekVLV2ForCausalLM"
    monkeypatch.setitem(ARCHITECTURES, config.model_config.architecture, model)
    with pytest.raises(StartupError, match="its own way of putting placeholders into prompts"):
        checks.check(config)


@pytest.mark.parametrize("name", ["MiniCPMV", "MiniCPMO"])
def test_classes_with_their_own_new_are_refused(config: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, config.model_config.architecture, f"{generic.__name__}:{name}")
    with pytest.raises(StartupError, match="creates an instance of another class"):
        checks.check(config)


def test_mrope_without_an_adapter_is_refused(family: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineArgs(str(family("qwen2_vl")), max_model_len=1024).create_engine_config()
    checks.check(config)
    name = config.model_config.architecture
    monkeypatch.setitem(ARCHITECTURES, name, f"{generic.__name__}:{name}")
    with pytest.raises(StartupError, match="this model has M-RoPE positions"):
        checks.check(config)


def test_encoder_decoders_are_refused(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vars(config.model_config), "is_encoder_decoder", True)
    with pytest.raises(StartupError, match="this model is an encoder-decoder"):
        checks.check(config)
