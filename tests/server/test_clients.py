"""The clients that people use, as they use them."""

import asyncio
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from harness import FRESH, KV_BYTES, VLLM, Server, content, environment
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from PIL import Image
from pydantic import SecretStr
from shared import Reference

Images = dict[str, Image.Image]
TEXT = "What is it?"
CLIENTS = Path(__file__).parent.parent.parent / "docs" / "clients.md"


def user(image: Image.Image) -> list[Any]:
    return [{"role": "user", "content": content(image, TEXT)}]


def test_openai(pruning: Server, reference: Reference, images: Images) -> None:
    kept = reference.kept(images["noise"], energy=0.8)
    raw = pruning.client.chat.completions.with_raw_response.create(
        model="demo", messages=user(images["noise"]), max_tokens=1, extra_body={"eadaprune": {"energy": 0.8}}
    )
    assert raw.headers["x-eadaprune-kept-tokens"] == str(len(kept))
    answer = raw.parse()
    assert answer.model_extra
    report = answer.model_extra["eadaprune"]
    (image,) = report["images"]
    assert image["spectral_energy"] == pytest.approx(kept.spectral_energy, abs=1e-6)
    assert image["span_energy"] == pytest.approx(kept.span_energy, abs=1e-5)
    expected = {"visual_tokens": 576, "kept_tokens": len(kept), "energy_threshold": 0.8, "selector": kept.selector}
    assert image.items() >= expected.items()
    assert report["tokens_saved"] == 576 - len(kept)
    assert report["kv_cache_bytes_saved"] == report["tokens_saved"] * KV_BYTES
    assert answer.usage
    assert answer.usage.prompt_tokens == pruning.text_tokens(TEXT) + len(kept)


def test_openai_detail(pruning: Server, reference: Reference, images: Images) -> None:
    counts = {}
    for detail in ("low", "high", "auto"):
        messages = user(images["noise"])
        messages[0]["content"][0]["image_url"]["detail"] = detail
        answer = pruning.client.chat.completions.create(model="demo", messages=messages, max_tokens=1)
        assert answer.model_extra
        counts[detail] = answer.model_extra["eadaprune"]["kept_tokens"]
    low = len(reference.kept(images["noise"], energy=0.6, min_tokens=4))
    assert counts == {"low": low, "high": 576, "auto": len(reference.kept(images["noise"], energy=0.95))}


def test_a_cached_image_reports_the_same(pruning: Server) -> None:
    image = Image.linear_gradient("L").convert("RGB")

    def report() -> dict[str, Any]:
        answer = pruning.ask(image, TEXT)
        assert answer.model_extra
        return dict(answer.model_extra["eadaprune"])

    cold, warm = report(), report()
    assert cold["images"][0].pop("cached") is False
    assert warm["images"][0].pop("cached") is True
    assert cold.pop("seconds") > 0
    assert warm.pop("seconds") == 0
    assert warm == cold


def test_openai_async_and_streaming(pruning: Server, reference: Reference, images: Images) -> None:
    async def ask(energy: float) -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{pruning.url}/v1", api_key="none", default_headers=FRESH) as client:
            stream = await client.chat.completions.create(
                model="demo",
                messages=user(images["coffee"]),
                max_tokens=4,
                stream=True,
                extra_body={"eadaprune": {"energy": energy}, "ignore_eos": True},
            )
            assert stream.response.headers["x-eadaprune-visual-tokens"] == "576"
            return [chunk async for chunk in stream]

    async def together() -> list[list[Any]]:
        return await asyncio.gather(*(ask(energy) for energy in (0.8, 0.99, 1.0)))

    for energy, (first, *others) in zip((0.8, 0.99, 1.0), asyncio.run(together()), strict=True):
        kept = len(reference.kept(images["coffee"], energy=energy))
        assert first.model_extra["eadaprune"]["kept_tokens"] == kept
        assert others[-1].choices[0].finish_reason == "length"  # tokens that wait for a slow client come together
        assert not any("eadaprune" in (chunk.model_extra or {}) for chunk in others)


def test_openai_responses(pruning: Server, reference: Reference, images: Images) -> None:
    url = content(images["noise"])[0]["image_url"]["url"]
    parts: list[Any] = [{"type": "input_image", "image_url": url, "detail": "low"}]
    settings: dict[str, Any] = {"model": "demo", "input": [{"role": "user", "content": parts}], "max_output_tokens": 2}
    answer = pruning.client.responses.create(**settings)
    kept = len(reference.kept(images["noise"], energy=0.6, min_tokens=4))
    assert answer.model_extra
    assert answer.model_extra["eadaprune"]["kept_tokens"] == kept
    first, *others = pruning.client.responses.create(**settings, stream=True)
    assert first.model_extra
    assert first.model_extra["eadaprune"]["kept_tokens"] == kept
    # Since 0.33 vLLM says that an answer which reached its limit is not complete.
    assert others[-1].type in ("response.completed", "response.incomplete")
    whole = [event.response.model_extra or {} for event in (first, *others) if hasattr(event, "response")]
    assert [extra["eadaprune"]["kept_tokens"] for extra in whole] == [kept] * 3  # created, in progress, completed


def test_anthropic(pruning: Server, reference: Reference, images: Images) -> None:
    client = anthropic.Anthropic(base_url=pruning.url, api_key="none", max_retries=0)
    data = content(images["noise"])[0]["image_url"]["url"].split(",")[1]
    image: Any = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}
    settings: dict[str, Any] = {
        "model": "demo",
        "max_tokens": 2,
        "messages": [{"role": "user", "content": [image, {"type": "text", "text": TEXT}]}],
        "extra_body": {"eadaprune": {"energy": 0.8}},
    }
    kept = len(reference.kept(images["noise"], energy=0.8))
    answer = client.messages.create(**settings)
    assert answer.model_extra
    assert answer.model_extra["eadaprune"]["kept_tokens"] == kept
    assert client.messages.count_tokens(
        model="demo", messages=settings["messages"], extra_body=settings["extra_body"]
    ).input_tokens == pruning.prompt_tokens(images["noise"], TEXT, options={"energy": 0.8})
    with client.messages.stream(**settings) as stream:
        assert stream.response.headers["x-eadaprune-kept-tokens"] == str(kept)
        message = stream.get_final_message()
    assert message.usage.input_tokens == answer.usage.input_tokens
    assert message.model_extra
    assert message.model_extra["eadaprune"]["kept_tokens"] == kept
    with pytest.raises(anthropic.BadRequestError, match=r"eadaprune\.energy=8 is not allowed"):
        client.messages.create(**(settings | {"extra_body": {"eadaprune": {"energy": 8}}}))


def test_langchain(pruning: Server, images: Images) -> None:
    for energy in (0.8, 1.0):
        model = ChatOpenAI(
            base_url=f"{pruning.url}/v1",
            api_key=SecretStr("none"),
            model="demo",
            extra_body={"eadaprune": {"energy": energy}},
        )
        answer = model.bind(max_tokens=2).invoke([HumanMessage(content=content(images["noise"], TEXT))])
        assert answer.usage_metadata
        expected = pruning.prompt_tokens(images["noise"], TEXT, options={"energy": energy})
        assert answer.usage_metadata["input_tokens"] == expected


def test_vllm_bench_serve(pruning: Server, model: Any) -> None:
    before = [pruning.metric(f"eadaprune_{name}_total") for name in ("images", "tokens_saved")]
    (line,) = re.findall(r"^vllm bench serve .*?[^\\]$", CLIENTS.read_text(), re.MULTILINE | re.DOTALL)
    _, *arguments = shlex.split(
        line.replace("\\\n", "").replace("http://localhost:8000", pruning.url).replace("MODEL", "demo")
    )
    fewer = ["--tokenizer", str(model), "--num-prompts", "6", "--max-concurrency", "2", "--random-output-len", "4"]
    done = subprocess.run([VLLM, *arguments, *fewer], env=environment(), capture_output=True, text=True, timeout=240)
    assert "Failed requests:                         0" in done.stdout, done.stdout + done.stderr[-3000:]
    images, saved = (
        pruning.metric(f"eadaprune_{name}_total") - earlier
        for name, earlier in zip(("images", "tokens_saved"), before, strict=True)
    )
    assert images >= 6
    assert saved > 300 * images
