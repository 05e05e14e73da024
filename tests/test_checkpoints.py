"""What a front end runs of every model: where its weights are found, and what it says about them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import FAMILIES, LATER, later_name, quantize
from huggingface_hub import save_torch_state_dict
from inprocess import SCENES
from PIL import Image
from safetensors.torch import load_file, save_file
from shared import encoder
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText
from vllm.exceptions import VLLMValidationError

from eadaprune_vllm.encoder import drawn
from eadaprune_vllm.errors import StartupError
from eadaprune_vllm.models.base import PruningProcessor
from eadaprune_vllm.models.items import joined
from eadaprune_vllm.models.qwen2_5_vl import Qwen2_5_VLVisionEncoder
from eadaprune_vllm.options import PruneOptions
from eadaprune_vllm.prune import Encoding, prune

HUB = [name for name in FAMILIES if name not in LATER]


def encode(folder: Path, scene: str = "wide", dtype: torch.dtype = torch.float32) -> Encoding:
    inputs = AutoImageProcessor.from_pretrained(folder)(SCENES[scene], return_tensors="pt")
    return encoder(folder, dtype).encode(inputs)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("scene", ["wide", "tall", "small", "large"])
def test_rows_are_the_features_of_the_whole_model(family: Callable[[str], Path], name: str, scene: str) -> None:
    """Of transformers' own model, in the order of its own prompt, newlines included."""
    folder = family(name)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).model
    inputs = AutoImageProcessor.from_pretrained(folder)(SCENES[scene], return_tensors="pt")
    with torch.inference_mode():
        found: Any = model.get_image_features(**inputs)
        front_end = encoder(folder, torch.float32)
        encoding = front_end.encode(inputs)
        kept = prune(encoding, PruneOptions(energy=1.0))
        rows = encoding.rows_of(kept)
        if not front_end.projected:  # the engine projects
            rows = model.multi_modal_projector(rows)
            if kept.newlines.any():
                rows = torch.where(kept.newlines[:, None], model.image_newline, rows)
    levels = [torch.cat(tuple(level)) for level in (found.pooler_output, *(found.get("deepstack_features") or ()))]
    torch.testing.assert_close(rows, torch.cat(levels, 1), atol=1e-4, rtol=1e-4)
    assert sum(height * width for height, width in encoding.grids) == encoding.tokens.num_tokens


@pytest.mark.parametrize("name", HUB)
def test_later_names_and_shards_load_the_same(family: Callable[[str], Path], name: str, tmp_path: Path) -> None:
    folder = family(name)
    weights = {later_name(stored): weight for stored, weight in load_file(folder / "model.safetensors").items()}
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    save_torch_state_dict(weights, tmp_path, max_shard_size="200KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert any(stored.startswith("model.") for stored in index)
    # As for a hub id, only the files that hold weights of the encoder are needed.
    ours = ("visual.", "vision_tower.", "multi_modal_projector.", "image_newline")
    needed = {file for stored, file in index.items() if stored.removeprefix("model.").startswith(ours)}
    for shard in tmp_path.glob("*.safetensors"):
        if shard.name not in needed:
            shard.unlink()
    assert torch.equal(encode(tmp_path).tokens.features, encode(folder).tokens.features)


def test_a_quantized_language_model_is_none_of_the_encoders_business(
    family: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = family("qwen2_5_vl")
    quantized = quantize(folder, tmp_path / "awq")
    assert torch.equal(encode(quantized).tokens.features, encode(folder).tokens.features)
    # As in FP8 checkpoints: the language model in 8 bit, with scales beside it.
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if ".layers." in name and name.endswith("_proj.weight")]:
        weights[name] = weights[name].to(torch.float8_e4m3fn)
        weights[f"{name}_scale_inv"] = torch.ones(1)
    save_file(weights, quantized / "model.safetensors")
    assert torch.equal(encode(quantized).tokens.features, encode(folder).tokens.features)


@pytest.mark.parametrize("name", ["llava_onevision", "qwen3_vl"])
def test_what_comes_after_the_tower_must_be_there_too(family: Callable[[str], Path], name: str, tmp_path: Path) -> None:
    shutil.copytree(family(name), tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(stored for stored in weights if "deepstack_merger_list" in stored or "projector" in stored)
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(StartupError, match=rf"lacks 1 of the \d+ weights .* such as {lost.removeprefix('model.')}"):
        encoder(tmp_path)


def test_full_towers_of_llava_next_are_refused(family: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(family("llava_next"), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vision_feature_select_strategy": "full"}))
    with pytest.raises(StartupError, match="vision_feature_select_strategy='full' is not supported"):
        encoder(tmp_path)


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
@pytest.mark.parametrize("size", [(800, 5), (5, 800), (200, 1), (300, 20)])
def test_very_thin_images_have_the_placeholders_of_stock_vllm(
    family: Callable[[str], Path], name: str, size: tuple[int, int]
) -> None:
    """Of which nothing but padding, or nothing but newlines, may be left."""
    folder = family(name)
    inputs = AutoImageProcessor.from_pretrained(folder)(Image.new("RGB", size), return_tensors="pt")
    found: Any = encoder(folder, torch.float32)
    encoding = found.encode(inputs)
    arranged = found.arrange(torch.zeros(len(inputs["pixel_values"][0]), found.side**2, 1), inputs["image_sizes"][0])
    assert len(prune(encoding, PruneOptions(energy=1.0)).placeholders) == len(arranged)
    assert len(prune(encoding, PruneOptions(energy=0.5, min_tokens=1))) < 20
    assert sum(height * width for height, width in encoding.grids) == encoding.tokens.num_tokens


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_rotary_frequencies_stay_in_float32(family: Callable[[str], Path], name: str) -> None:
    buffers = dict(encoder(family(name), torch.bfloat16).named_buffers())
    assert {buffer.dtype for buffer in buffers.values()} == {torch.float32}


def test_items_are_joined_whatever_their_shapes() -> None:
    """Timestamps of two videos are of different lengths; vLLM takes a tensor or a list."""
    short, long = torch.ones(1, 2), torch.ones(1, 3)
    assert joined(joined(None, short), short).shape == (2, 2)
    assert [len(item) for item in joined(joined(short, long), long)] == [2, 3, 3]
    assert joined([[0.5]], [[1.0]]) == [[0.5], [1.0]]


def test_positions_reach_as_far_as_the_models_table() -> None:
    """Four times its length, YaRN's factor included."""

    def refused(skipped: int, **rope: Any) -> bool:
        text = SimpleNamespace(max_position_embeddings=1000, rope_parameters=rope)
        model = SimpleNamespace(hf_text_config=text, uses_mrope=True, max_model_len=1000)
        processor: Any = SimpleNamespace(info=SimpleNamespace(ctx=SimpleNamespace(model_config=model)))
        try:
            PruningProcessor._check_positions(processor, skipped)
        except VLLMValidationError:
            return True
        return False

    assert [refused(skipped, rope_type="default") for skipped in (-5, 3000, 3001)] == [False, False, True]
    yarn = {"rope_type": "yarn", "original_max_position_embeddings": 1000, "factor": 4.0}
    assert [refused(skipped, **yarn) for skipped in (15000, 15001)] == [False, True]


def test_attention_drawn_is_the_mean_over_heads_and_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = torch.randn(3, 7, 5), torch.randn(3, 7, 5)
    expected = (query @ key.transpose(1, 2) * 0.4).softmax(-1).mean((0, 1))
    torch.testing.assert_close(drawn(query, key, 0.4), expected)
    monkeypatch.setattr("eadaprune_vllm.encoder._ATTENTION_WEIGHTS", 50)  # two queries at a time
    torch.testing.assert_close(drawn(query, key, 0.4), expected)


def test_windows_do_not_change_what_attention_means(family: Callable[[str], Path]) -> None:
    """With full attention everywhere, windows only reorder tokens, and the order must come out undone."""
    folder = family("qwen2_5_vl")
    config = AutoConfig.from_pretrained(folder)
    config.vision_config.fullatt_block_indexes = list(range(config.vision_config.depth))
    inputs = AutoImageProcessor.from_pretrained(folder)(SCENES["large"], return_tensors="pt")
    weights = encoder(folder, torch.float32).state_dict()

    def attention(window: int) -> torch.Tensor:
        config.vision_config.window_size = window
        built = Qwen2_5_VLVisionEncoder(config).eval()
        built.load_state_dict(weights)
        found = built.encode(inputs).tokens.attention
        assert found is not None
        return found

    torch.testing.assert_close(attention(56), attention(4096), atol=1e-6, rtol=1e-4)
