"""What the operator sets, and the routes of the plugin's own."""

import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from browser import Browser
from grafana.board import ROWS
from harness import DTYPE, Server, content
from numpy.typing import NDArray
from PIL import Image
from selenium.webdriver.common.keys import Keys
from shared import Reference
from transformers import AutoImageProcessor

from eadaprune_vllm.core.draw import picture, preprocessed
from eadaprune_vllm.core.selectors import SELECTORS
from eadaprune_vllm.core.server_options import ServerOptions

Images = dict[str, Image.Image]
RULES = Path(__file__).parents[2] / "deploy/prometheus/rules.yml"
KEY = {"Authorization": "Bearer sesame"}
OPTIONS: dict[str, Any] = {
    "energy": 0.9,
    "energy_floor": 0.5,
    "energy_ceiling": 0.95,
    "max_tokens_ceiling": 150,
    "min_tokens": 16,
    "min_share": 0.0,
}


@pytest.fixture(scope="module")
def guarded(start: Callable[..., Server]) -> Server:
    """A key, and bounds that requests must keep."""
    flags = ["--plugin", "eadaprune", "--enforce-eager", "--dtype", DTYPE, "--api-key", "sesame"]
    for name, value in OPTIONS.items():
        flags += [f"--eadaprune-{name.replace('_', '-')}", str(value)]
    return start("guarded", *flags, "--limit-mm-per-prompt", '{"image": 2}')


def chat(*images: Image.Image, **extra: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": [{"role": "user", "content": content(*images, "What?")}], **extra}


def test_routes_sit_behind_the_key(guarded: Server, images: Images) -> None:
    body = chat(images["flat"])
    for path in ("/v1/eadaprune/preview", "/v1/chat/completions"):
        assert guarded.post(path, body).status_code == 401
        assert guarded.post(path, body | {"max_tokens": 1}, **KEY).status_code == 200
    assert httpx.get(f"{guarded.url}/v1/eadaprune/config", timeout=120).status_code == 401


def test_the_page_asks_for_the_key_and_keeps_the_bounds(guarded: Server, images: Images, tmp_path: Path) -> None:
    images["noise"].save(tmp_path / "noise.png")
    with Browser(f"{guarded.url}/eadaprune") as browser:
        browser.wait("#problem", has="This server needs an API key.")
        browser.press("#key", "wrong", Keys.ENTER)
        browser.wait("#problem", has="The server rejects this API key.")
        browser.find("#key").clear()
        browser.press("#key", "sesame", Keys.ENTER)
        browser.wait("#model", has="demo")
        assert browser.run("return [sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
        browser.picture(tmp_path / "noise.png")
        for key, threshold in ((Keys.END, "0.95"), (Keys.HOME, "0.5")):
            browser.press("#slider", key)
            browser.wait("#threshold", has=threshold)
        for kind in ("curl", "python"):
            browser.choose(kind)
            assert "sesame" not in browser.text("#text")
            assert ("$OPENAI_API_KEY" in browser.text("#text")) is (kind == "curl")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"energy": 0.4}, "eadaprune.energy=0.4 is outside the bounds of this server: energy_floor=0.5, energy_ceil"),
        ({"energy": 0.99}, "eadaprune.energy=0.99 is outside the bounds of this server"),
        ({"enabled": False}, "eadaprune.enabled=False is outside the bounds of this server"),
        ({"max_tokens": 151}, "eadaprune.max_tokens=151 is outside the bounds of this server"),
    ],
)
def test_requests_beyond_the_bounds_are_refused(
    guarded: Server, images: Images, options: dict[str, Any], words: str
) -> None:
    response = guarded.post("/v1/chat/completions", chat(images["noise"], eadaprune=options, max_tokens=1), **KEY)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]
    assert response.json()["error"]["param"] == f"eadaprune.{next(iter(options))}"


def test_presets_stay_within_the_bounds(guarded: Server, images: Images, reference: Reference) -> None:
    body = chat(images["noise"], max_tokens=1)
    body["messages"][0]["content"][0]["image_url"]["detail"] = "high"
    report = guarded.post("/v1/chat/completions", body, **KEY).json()["eadaprune"]
    assert report["images"][0]["energy_threshold"] == 0.95
    assert report["kept_tokens"] == len(reference.kept(images["noise"], energy=0.95, max_tokens=150))


def test_reports_do_not_reveal_what_other_clients_sent(guarded: Server, images: Images) -> None:
    body = chat(images["moon"], max_tokens=1)
    for path in ("/v1/chat/completions", "/v1/chat/completions", "/v1/eadaprune/preview"):
        answer = guarded.post(path, body, **KEY).json()
        report = answer.get("eadaprune") or answer
        assert report["seconds"] is report["images"][0]["cached"] is None


def test_config(guarded: Server) -> None:
    found = httpx.get(f"{guarded.url}/v1/eadaprune/config", headers=KEY, timeout=120).json()
    assert found["configured"] == ServerOptions(**OPTIONS).model_dump()
    assert found["models"] == ["demo"]
    assert found["architecture"] == "LlavaForConditionalGeneration"
    assert found["selectors"] == list(SELECTORS)
    endpoints = ["/invocations", "/tokenize", "/v1/chat/completions", "/v1/chat/completions/batch", "/v1/messages"]
    assert sorted(found["endpoints"]) == [*endpoints, "/v1/messages/count_tokens", "/v1/responses", "/v1/systemone"]


def test_preview_says_what_a_request_would_get(
    guarded: Server, images: Images, reference: Reference, model: Path
) -> None:
    body = chat(images["astronaut"], images["noise"], eadaprune={"energy": 0.8})
    body["messages"][0]["content"][0]["eadaprune"] = {"energy": 0.6, "selector": "attention"}
    before = guarded.metric("eadaprune_images_total")
    found = guarded.post("/v1/eadaprune/preview", body | {"overlay": True}, **KEY).json()
    assert guarded.metric("eadaprune_images_total") == before  # nothing entered the engine
    report = guarded.post("/v1/chat/completions", body | {"max_tokens": 1}, **KEY).json()["eadaprune"]
    for name in ("visual_tokens", "kept_tokens", "tokens_saved", "kv_cache_bytes_saved"):
        assert found[name] == report[name]
    expected = [
        ("astronaut", reference.kept(images["astronaut"], energy=0.6, selector="attention", max_tokens=150)),
        ("noise", reference.kept(images["noise"], energy=0.8, max_tokens=150)),
    ]
    processor = AutoImageProcessor.from_pretrained(model)
    for image, same, (name, kept) in zip(found["images"], report["images"], expected, strict=True):
        assert same.items() <= image.items()
        assert image["kept_tokens"] == len(kept)
        curve = image["curve"]
        assert len(curve) <= 64
        assert curve[0][0] == 1
        assert curve == sorted(curve)
        assert curve[-1][1] == pytest.approx(1)
        # The curve explains the count: without the clamps the budget is where it reaches the threshold.
        below = [k for k, energy in curve if energy < image["energy_threshold"]]
        reached = [k for k, energy in curve if energy >= image["energy_threshold"]]
        assert below[-1] < reached[0]
        assert min(max(below[-1] + 1, 16), 150) <= image["kept_tokens"] <= max(reached[0], 16)
        assert image["overlay"].startswith("data:image/jpeg;base64,")
        overlay = picture(image["overlay"])
        assert overlay.size == (336, 336)
        shown = patches(preprocessed(processor, images[name]))
        pruned = ~np.isin(np.arange(576), kept.indices)
        shown[pruned] = 0.3 * shown[pruned] @ [[0.299], [0.587], [0.114]]  # dark and grey
        assert np.abs(patches(overlay) - shown).max() < 10


def patches(picture: Image.Image) -> NDArray[np.float64]:
    """``[576, 3]``, the mean colour of each: what JPEG leaves as it is."""
    means: NDArray[np.float64] = np.asarray(picture).reshape(24, 14, 24, 14, 3).mean(axis=(1, 3))
    return means.reshape(576, 3)


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"eadaprune": {"energy": 0.1}}, 400, "outside the bounds"),
        ({"eadaprune": []}, 400, "[] is not an object of pruning options"),
        ({"model": "other"}, 404, "The model `other` does not exist"),
        ({"overlay": "maybe"}, 400, "valid boolean"),
        ({"messages": 3}, 400, "valid list"),
        ({"messages": [{"role": "user", "content": 5}]}, 400, "messages.0.content"),
        ({"mm_processor_kwargs": {"eadaprune": {"energy": 7}}}, 400, "mm_processor_kwargs.eadaprune.energy=7 is not"),
        ({"messages": [{"content": [{"type": "image_url", "image_url": {}}]}]}, 400, "needs the URL of every image"),
        ({"messages": [{"content": [{"type": "image_url", "image_url": "zz"}]}]}, 400, "must be either a HTTP, data"),
        (
            {"messages": [{"content": [{"type": "image_url", "image_url": "http://127.0.0.1:1/a.png"}]}]},
            400,
            "an image or video could not be read",
        ),
        ({"messages": [{"content": [{"image_url": "data:,", "uuid": "a"}] * 3}]}, 400, "At most 2 image(s)"),
        (
            {"messages": [{"content": [{"image_url": "data:,"}] * 9}], "overlay": True},
            400,
            "overlay is for previews of at most 8 images and videos, and this one has 9",
        ),
        ({"messages": [{"content": [{"image_url": "data:,"}] * 9}], "spectrum": True}, 400, "spectrum is for previews"),
        ({"mm_processor_kwargs": {"max_pixels": 9}}, 400, "previews do not support mm_processor_kwargs"),
        ({"media_io_kwargs": "video"}, 400, "previews do not support media_io_kwargs"),
    ],
)
def test_invalid_previews_are_rejected(guarded: Server, change: Any, status: int, words: str) -> None:
    response = guarded.post("/v1/eadaprune/preview", {"messages": []} | change, **KEY)
    assert response.status_code == status, response.text
    assert words in response.json()["error"]["message"]


WATCHED = [query.expr for row in ROWS for panel in row.panels for query in panel.queries]
WATCHED += [rule["expr"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def watched(server: Server) -> dict[str, float]:
    """All samples that the dashboard or an alert looks at."""
    found = {}
    for name, matchers in re.findall(r"((?:eadaprune_|vllm:)\w+)(?:\{([^}]*)\})?", " ".join(WATCHED)):
        fixed = [(label, value) for label, value in re.findall(r'(\w+)=~?"([^"]*)"', matchers) if "$" not in value]
        for sample in server.samples():
            if sample.name == name and all(re.fullmatch(value, sample.labels[label]) for label, value in fixed):
                found[f"{name}{sample.labels}"] = sample.value
    return found


def test_previews_change_no_alerting_metric(guarded: Server, images: Images) -> None:
    """Neither those that are given, whatever they cost, nor those that are refused. Equal images are encoded once."""
    body = chat(images["rocket"])
    assert guarded.post("/v1/chat/completions", body | {"max_tokens": 1}, **KEY).status_code == 200
    guarded.wait_until_idle()
    before = watched(guarded)
    own = {"source": "preview"}
    encoded, refused = (
        partial(guarded.metric, "eadaprune_stage_seconds_count", stage="encode", **own),
        partial(guarded.metric, "eadaprune_rejected_requests_total", reason="options", **own),
    )
    counts = encoded(), refused()
    for given, status in (
        (chat(images["moon"], images["moon"], overlay=True, spectrum=True), 200),
        (chat(images["moon"], eadaprune={"energy": 7}), 400),
        (chat(images["moon"], images["moon"], images["moon"]), 400),
    ):
        assert guarded.post("/v1/eadaprune/preview", given, **KEY).status_code == status
    assert (encoded(), refused()) == (counts[0] + 1, counts[1] + 1)
    assert watched(guarded) == before
    guarded.post("/v1/chat/completions", body | {"eadaprune": {"energy": 7}}, **KEY)
    assert watched(guarded) != before


def test_preview_rejects_a_body_that_is_not_json(guarded: Server) -> None:
    for body in ("{", "\ud800".encode("utf-8", "surrogatepass"), "[" * 100_000):
        headers = KEY | {"content-type": "application/json"}
        response = httpx.post(f"{guarded.url}/v1/eadaprune/preview", content=body, headers=headers, timeout=120)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "body"


def test_a_preview_without_images(guarded: Server) -> None:
    found = guarded.post("/v1/eadaprune/preview", {"messages": [{"role": "user", "content": "hi"}]}, **KEY).json()
    assert found["images"] == []


def test_openapi_lists_options_and_headers(guarded: Server) -> None:
    paths = httpx.get(f"{guarded.url}/openapi.json", timeout=120).json()["paths"]
    chat = paths["/v1/chat/completions"]["post"]
    schema = chat["requestBody"]["content"]["application/json"]["schema"]
    assert schema["$ref"] == "#/components/schemas/ChatCompletionRequest"
    assert schema["properties"]["eadaprune"]["properties"]["energy"]["maximum"] == 1
    assert "X-EAdaPrune-Energy" in [parameter["name"] for parameter in chat["parameters"]]
    report = chat["responses"]["200"]["content"]["application/json"]["schema"]["properties"]["eadaprune"]
    assert "kept_tokens" in report["properties"]["images"]["items"]["properties"]
    assert "eadaprune" not in str(paths["/v1/completions"])


def test_no_input_of_our_routes_is_a_server_error(guarded: Server, tmp_path: Path) -> None:
    schemathesis = Path(sys.executable).with_name("schemathesis")
    command = [str(schemathesis), "run", f"{guarded.url}/openapi.json"]
    command += ["--include-path-regex", "^/v1/eadaprune/", "-H", "Authorization: Bearer sesame", "--seed", "1"]
    command += ["--max-examples", "60", "--checks", "not_a_server_error,response_schema_conformance", "--no-color"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "2 selected" in done.stdout
