"""The tower in the front end against transformers' whole model, and where its weights come from."""

import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from shared import Reference, encoder, towers
from transformers import AutoConfig, LlavaForConditionalGeneration, PixtralVisionConfig

from eadaprune_vllm.checkpoint import INDEX, Checkpoint
from eadaprune_vllm.encoder import LlavaVisionEncoder, PackedLinear, compute_dtype
from eadaprune_vllm.errors import StartupError
from eadaprune_vllm.selectors import VisualTokens


@pytest.fixture(params=["clip", "siglip"])
def folder(request: pytest.FixtureRequest, model: Path, siglip: Path) -> Path:
    return model if request.param == "clip" else siglip


def encode(folder: Path, pixels: torch.Tensor, **settings: Any) -> VisualTokens:
    return encoder(folder, **settings).encode({"pixel_values": pixels}).tokens


def test_features_and_attention_are_those_of_the_whole_model(folder: Path) -> None:
    whole = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    pixels = torch.randn(1, 3, 336, 336)
    with torch.no_grad():
        out = whole.model.vision_tower(pixels, output_hidden_states=True, output_attentions=True)
    tokens = encode(folder, pixels, dtype=torch.float32)
    cls = whole.config.vision_config.model_type == "clip_vision_model"
    assert tokens.num_tokens == 576
    torch.testing.assert_close(tokens.features, out.hidden_states[-2][0, int(cls) :], atol=1e-4, rtol=1e-4)
    attention = out.attentions[-2][0].mean(0)
    torch.testing.assert_close(tokens.attention, attention[0, 1:] if cls else attention.mean(0))


def test_only_the_layers_in_use_are_built(folder: Path) -> None:
    found: Any = encoder(folder)
    assert len(found.vision_tower.encoder.layers) == 3  # the fourth feeds nothing
    assert {weight.dtype for weight in found.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("instruction", "dtype"), [("avx512_bf16", torch.bfloat16), ("avx2", torch.float32)])
def test_the_tower_computes_in_what_the_cpu_is_fast_at(
    monkeypatch: pytest.MonkeyPatch, instruction: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {instruction: True})
    found = {given: compute_dtype(given) for given in (torch.bfloat16, torch.float16, torch.float32)}
    assert found == {torch.bfloat16: dtype, torch.float16: torch.float32, torch.float32: torch.float32}


def test_encoding_does_not_depend_on_what_else_is_encoded(model: Path, images: dict[str, Any]) -> None:
    first, second = Reference(model, torch.bfloat16), Reference(model, torch.bfloat16)
    alone = {name: first.kept(image).indices.tolist() for name, image in images.items()}
    for name in reversed(images):
        assert second.kept(images[name]).indices.tolist() == alone[name]


def test_threads_are_restored(model: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with encoder(model).threads():
        assert torch.get_num_threads() == len(os.sched_getaffinity(0))
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)


def test_shards_and_other_names_load_the_same(siglip: Path, tmp_path: Path) -> None:
    assert (siglip / INDEX).exists()
    weights: dict[str, torch.Tensor] = {}
    for shard in siglip.glob("*.safetensors"):
        weights |= load_file(shard)
    renamed = {
        name.replace("vision_tower.vision_model.", "model.vision_tower."): value for name, value in weights.items()
    }
    assert renamed.keys() != weights.keys()
    save_file(renamed, tmp_path / "model.safetensors")
    shutil.copy(siglip / "config.json", tmp_path)
    pixels = torch.randn(1, 3, 336, 336)
    assert torch.equal(encode(siglip, pixels).features, encode(tmp_path, pixels).features)


def test_only_the_files_of_the_tower_are_needed(siglip: Path, tmp_path: Path) -> None:
    """As for a hub id: files without a weight of the tower are never asked for."""
    shutil.copytree(siglip, tmp_path, dirs_exist_ok=True)
    for shard in tmp_path.glob("*.safetensors"):
        if not any("vision_tower" in name for name in load_file(shard)):
            shard.unlink()
    assert len(list(tmp_path.glob("*.safetensors"))) < len(list(siglip.glob("*.safetensors")))
    encoder(tmp_path)


def test_dummy_weights_are_the_same_everywhere(model: Path) -> None:
    pixels = torch.randn(1, 3, 336, 336)
    first, second = (encode(model, pixels, load_format="dummy").features for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, encode(model, pixels).features)


def test_hub_ids_are_read_from_the_download_dir(siglip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache layout of huggingface_hub, filled by hand: offline, at a revision, in ``--download-dir``."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--some--llava"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "v2").write_text(commit)
    shutil.copytree(siglip, repo / "snapshots" / commit)
    build = partial(LlavaVisionEncoder, AutoConfig.from_pretrained(siglip))
    source = Checkpoint("some/llava", "v2", str(tmp_path), "auto", torch.bfloat16)
    pixels = torch.randn(1, 3, 336, 336)
    found = source.load(build).encode({"pixel_values": pixels}).tokens
    assert torch.equal(found.features, encode(siglip, pixels).features)
    with pytest.raises(StartupError, match="of some/llava cannot be fetched"):
        Checkpoint("some/llava", "v3", str(tmp_path), "auto", torch.bfloat16).check(build)


def broken(model: Path, folder: Path, change: Any) -> Path:
    shutil.copytree(model, folder, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    return folder


QUERY = "encoder.layers.0.self_attn.q_proj.weight"


def test_a_checkpoint_that_lacks_a_weight_is_refused(model: Path, tmp_path: Path) -> None:
    def drop(weights: dict[str, torch.Tensor]) -> None:
        del weights[next(name for name in weights if name.endswith(QUERY))]

    with pytest.raises(StartupError, match=rf"lacks 1 of the \d+ weights .* such as vision_tower\.{QUERY}"):
        encoder(broken(model, tmp_path, drop))


def test_a_misshapen_weight_is_refused(model: Path, tmp_path: Path) -> None:
    def cut(weights: dict[str, torch.Tensor]) -> None:
        name = next(name for name in weights if name.endswith(QUERY))
        weights[name] = weights[name][:-1].clone()

    with pytest.raises(StartupError, match=r"in shape \(255, 256\), where its configuration says \(256, 256\)"):
        encoder(broken(model, tmp_path, cut))


def test_a_checkpoint_without_safetensors_is_refused(model: Path, tmp_path: Path) -> None:
    shutil.copy(model / "config.json", tmp_path)
    with pytest.raises(StartupError, match=r"neither model\.safetensors nor"):
        encoder(tmp_path)


def test_an_unreadable_file_is_refused(model: Path, tmp_path: Path) -> None:
    shutil.copy(model / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(StartupError, match="not a readable safetensors file"):
        encoder(tmp_path)


def test_a_quantized_tower_is_refused(model: Path, tmp_path: Path) -> None:
    def quantize(weights: dict[str, torch.Tensor]) -> None:
        name = next(name for name in weights if name.endswith(QUERY))
        weights[name] = weights[name].to(torch.float8_e4m3fn)

    with pytest.raises(StartupError, match=r"as F8_E4M3; quantized vision encoders are not supported"):
        encoder(broken(model, tmp_path, quantize))


def test_files_that_were_not_pulled_are_refused(siglip: Path, tmp_path: Path) -> None:
    """Pointers of git-lfs in the place of a shard, and of the index."""
    shutil.copytree(siglip, tmp_path, dirs_exist_ok=True)
    index = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    shard = next(file for name, file in index.items() if "vision_tower" in name)
    for name, words in ((shard, "not a readable safetensors file"), (INDEX, "not an index")):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1")
        with pytest.raises(StartupError, match=words):
            encoder(tmp_path)


def test_other_load_formats_are_refused(model: Path) -> None:
    with pytest.raises(StartupError, match="--load-format tensorizer is not supported; supported are auto"):
        encoder(model, load_format="tensorizer")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vision_config": PixtralVisionConfig()}, "of type 'pixtral'; supported are 'clip_vision_model'"),
        ({"vision_feature_layer": [-2, -1]}, r"\[-2, -1\] is not supported; it must be one integer"),
        ({"vision_feature_layer": 9}, "names no layer of a tower with 4 layers"),
        ({"vision_feature_layer": 0}, "names no layer"),
    ],
)
def test_towers_that_are_not_supported_are_refused(model: Path, changes: dict[str, Any], words: str) -> None:
    config = AutoConfig.from_pretrained(model)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(StartupError, match=words):
        LlavaVisionEncoder(config)


def test_the_search_for_towers_finds_them(model: Path) -> None:
    """The server tests rely on it finding nothing in a worker."""
    assert "CLIPVisionModel" in towers(encoder(model))


@pytest.mark.skipif(compute_dtype(torch.bfloat16) != torch.bfloat16, reason="this CPU has no bfloat16 instructions")
def test_packed_weights_compute_the_same_to_the_bit() -> None:
    linear = torch.nn.Linear(96, 160).bfloat16().requires_grad_(False)
    for shape in ((7, 96), (577, 96), (3, 577, 96)):
        rows = torch.randn(shape).bfloat16()
        assert torch.equal(PackedLinear(linear)(rows), linear(rows))
