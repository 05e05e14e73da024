"""Images, videos and embeddings over HTTP, with a model of dynamic resolution."""

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_lora
from harness import Server
from inprocess import SCENES, TEXT, message
from PIL import Image
from shared import Reference
from transformers import AutoImageProcessor

from eadaprune_vllm.core.draw import data_url, picture

SOME = {"energy": 0.9, "min_tokens": 4}


@pytest.fixture(scope="module")
def folder(family: Callable[[str], Path]) -> Path:
    return family("qwen2_5_vl")


@pytest.fixture(scope="module")
def qwen(start: Callable[..., Server], folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Server:
    adapters = tmp_path_factory.mktemp("lora")
    make_lora(folder, adapters / "tuned", "q_proj", "down_proj")
    flags = ["--plugin", "eadaprune", "--dtype", "float32", "--enforce-eager", "--enable-mm-embeds"]
    flags += ["--limit-mm-per-prompt", '{"image": 128, "video": 2}', "--max-num-batched-tokens", "128"]
    flags += ["--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"tuned={adapters / 'tuned'}"]
    return start("qwen", *flags, model=folder, VLLM_ALLOW_RUNTIME_LORA_UPDATING="1")


def chat(server: Server, *words: str, model: str = "demo", options: object = None, **extra: Any) -> dict[str, Any]:
    body = {"model": model, "messages": [message(list(words), None)], "max_tokens": 4, "temperature": 0}
    body |= {"ignore_eos": True, **extra} | ({} if options is None else {"eadaprune": options})
    response = server.post("/v1/chat/completions", body)
    found: dict[str, Any] = response.json()
    return found | {"status": response.status_code, "headers": response.headers}


def test_images_and_videos_are_reported_apart(qwen: Server) -> None:
    words = ["wide", "and", "clip", "then", "square", "short", TEXT]
    whole = chat(qwen, *words, options={"energy": 1.0})
    before = qwen.metric("eadaprune_images_total"), qwen.metric("eadaprune_videos_total")
    pruned = chat(qwen, *words, options=SOME)
    report = pruned["eadaprune"]
    assert len(report["images"]) == len(report["videos"]) == 2
    assert {item["kept_tokens"] for item in whole["eadaprune"]["videos"]} == {72, 32}
    assert report["tokens_saved"] == whole["usage"]["prompt_tokens"] - pruned["usage"]["prompt_tokens"] > 0
    assert int(pruned["headers"]["x-eadaprune-kept-tokens"]) == report["kept_tokens"]
    after = qwen.metric("eadaprune_images_total"), qwen.metric("eadaprune_videos_total")
    assert [later - earlier for earlier, later in zip(before, after, strict=True)] == [2, 2]


def test_a_video_has_options_of_its_own(qwen: Server) -> None:
    content = message(["square", "clip", TEXT], None)
    content["content"][1]["eadaprune"] = {"energy": 0.5, "min_tokens": 1, "scope": "image"}
    body = {"model": "demo", "messages": [content], "max_tokens": 1}
    report = qwen.post("/v1/chat/completions", body).json()["eadaprune"]
    assert report["images"][0]["target"] is not None
    assert (report["videos"][0]["target"], report["videos"][0]["energy_threshold"]) == (None, 0.5)
    content["content"][1]["eadaprune"] = {"scope": "frame"}
    response = qwen.post("/v1/chat/completions", body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "videos[0].eadaprune.scope"
    assert "must be one of tile, image" in response.json()["error"]["message"]


def test_a_preview_shows_every_frame(qwen: Server) -> None:
    body = {"messages": [message(["wide", "clip"], None)], "eadaprune": SOME, "overlay": True}
    found = qwen.post("/v1/eadaprune/preview", body).json()
    served = chat(qwen, "wide", "clip", options=SOME)["eadaprune"]
    for kind in ("images", "videos"):
        assert found[kind][0]["kept_tokens"] == served[kind][0]["kept_tokens"]
        assert found[kind][0]["curve"][-1] == [found[kind][0]["visual_tokens"], 1.0]
    wide = SCENES["wide"]
    assert picture(found["images"][0]["overlay"]).size == wide.size
    frames = picture(found["videos"][0]["overlay"])
    assert frames.width > 3 * 160
    assert frames.height < 2 * 120


def embeds(**tensors: torch.Tensor) -> dict[str, Any]:
    def encoded(tensor: torch.Tensor) -> str:
        buffer = io.BytesIO()
        torch.save(tensor, buffer)
        return base64.b64encode(buffer.getvalue()).decode()

    return {"type": "image_embeds", "image_embeds": {name: encoded(tensor) for name, tensor in tensors.items()}}


@pytest.fixture(scope="module")
def encoded(folder: Path) -> dict[str, torch.Tensor]:
    """An image as a client that has the encoder would send it."""
    inputs = AutoImageProcessor.from_pretrained(folder)(SCENES["square"], return_tensors="pt")
    rows = Reference(folder, torch.float32).encode(inputs).tokens.features
    return {"image_embeds": rows, "image_grid_thw": inputs["image_grid_thw"][0]}


def ask_embeds(server: Server, part: dict[str, Any], options: dict[str, Any]) -> Any:
    messages = [{"role": "user", "content": [part, {"type": "text", "text": TEXT}]}]
    body = {"model": "demo", "messages": messages, "max_tokens": 4, "temperature": 0, "eadaprune": options}
    return server.post("/v1/chat/completions", body | {"ignore_eos": True})


@pytest.mark.parametrize("options", [{"energy": 1.0}, SOME])
def test_embeddings_are_pruned_as_the_image_is_by_span(
    qwen: Server, encoded: dict[str, torch.Tensor], options: dict[str, Any]
) -> None:
    found = ask_embeds(qwen, embeds(**encoded), options | {"selector": "attention"}).json()
    image = chat(qwen, "square", TEXT, options=options | {"selector": "span"})
    assert found["eadaprune"]["images"][0]["selector"] == ("span" if options == SOME else "attention")
    assert found["usage"] == image["usage"]
    assert found["choices"][0]["message"]["content"] == image["choices"][0]["message"]["content"]


@pytest.mark.parametrize("options", [{"energy": 1.0}, SOME])
def test_invalid_client_embeddings_are_rejected(
    qwen: Server, encoded: dict[str, torch.Tensor], options: dict[str, Any]
) -> None:
    rows, grid = encoded["image_embeds"], encoded["image_grid_thw"]
    bad = rows.clone()
    bad[3] = torch.nan
    for part in (
        embeds(image_embeds=bad, image_grid_thw=grid),
        embeds(image_embeds=rows[:-1], image_grid_thw=grid),
        embeds(image_embeds=rows, image_grid_thw=grid * 2),
        embeds(image_embeds=rows[:, :-1], image_grid_thw=grid),
    ):
        response = ask_embeds(qwen, part, options)
        assert response.status_code == 400, response.text
    assert chat(qwen, "square", TEXT)["status"] == 200


def test_positions_beyond_the_models_are_refused(qwen: Server) -> None:
    """Kept tokens have their own positions, so few tokens can span many: here each image one token, 144 positions."""
    panorama = {"type": "image_url", "image_url": {"url": data_url(Image.new("RGB", (4032, 28)))}}
    body = {"model": "demo", "max_tokens": 1, "eadaprune": {"energy": 0.5, "min_tokens": 1}}
    fine, beyond = (
        qwen.post("/v1/chat/completions", body | {"messages": [{"role": "user", "content": [panorama] * count}]})
        for count in (100, 101)
    )
    assert fine.status_code == 200, fine.text
    assert fine.json()["eadaprune"]["kept_tokens"] == 100
    assert beyond.status_code == 400
    assert "up to 14443 positions more than it has tokens" in beyond.text
    assert chat(qwen, "square", TEXT)["status"] == 200


def test_lora_on_the_language_model(qwen: Server) -> None:
    base, tuned = (chat(qwen, "square", TEXT, model=model, options=SOME, logprobs=True) for model in ("demo", "tuned"))
    assert base["usage"] == tuned["usage"]
    assert base["choices"][0]["logprobs"] != tuned["choices"][0]["logprobs"]


def test_lora_on_the_tower_is_left_out(qwen: Server, folder: Path, tmp_path: Path) -> None:
    """As on stock vLLM, which says so in its log. The flag that would take it in is refused."""
    make_lora(folder, tmp_path, "q_proj", "attn.qkv")
    response = qwen.post("/v1/load_lora_adapter", {"lora_name": "tower", "lora_path": str(tmp_path)})
    assert response.status_code == 200, response.text
    base, tuned = (chat(qwen, "square", TEXT, model=model, options=SOME, logprobs=True) for model in ("demo", "tower"))
    assert base["eadaprune"]["images"][0]["spectral_energy"] == tuned["eadaprune"]["images"][0]["spectral_energy"]
    assert base["choices"][0]["logprobs"] != tuned["choices"][0]["logprobs"]
    assert "visual.blocks.0.attn.qkv will be ignored" in qwen.log.read_text()


def test_invalid_video_is_rejected(qwen: Server) -> None:
    part = {"type": "video_url", "video_url": {"url": data_url(Image.new("RGB", (8, 8)))}}
    body = {"model": "demo", "messages": [{"role": "user", "content": [part]}]}
    response = qwen.post("/v1/eadaprune/preview", body)
    assert response.status_code == 400
    assert "could not be read" in response.text
