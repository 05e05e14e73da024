"""A little of everything, for releases of vLLM and Pythons on which not every test is run."""

from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress

import httpx
from endpoints import anthropic
from fastapi import FastAPI
from harness import Server, content
from PIL import Image
from shared import Reference, noise
from vllm.entrypoints.openai.chat_completion.api_router import router
from vllm.v1.engine.core import EngineCoreProc

Images = dict[str, Image.Image]
ENERGY = {"energy": 0.9}


def test_chat(pruning: Server, reference: Reference, images: Images) -> None:
    report = pruning.ask(images["coffee"], "What?", options=ENERGY).model_dump()["eadaprune"]
    kept = len(reference.kept(images["coffee"], **ENERGY))
    assert report["kept_tokens"] == kept < 576
    text = pruning.text_tokens("What?")
    assert pruning.prompt_tokens(images["coffee"], "What?", options=ENERGY) == text + kept
    assert pruning.metric("eadaprune_images_total") >= 3


def test_stream(pruning: Server, images: Images) -> None:
    messages = [{"role": "user", "content": content(images["coffee"], "What?")}]
    body = {"model": "demo", "messages": messages, "max_tokens": 4, "stream": True, "eadaprune": ENERGY}
    response = pruning.post("/v1/chat/completions", body)
    assert response.headers["X-EAdaPrune-Visual-Tokens"] == "576"
    assert response.text.count('"eadaprune":{"images":[{"visual_tokens":576') == 1
    assert response.text.rstrip().endswith("data: [DONE]")


def test_a_bad_threshold_is_a_400(pruning: Server, images: Images) -> None:
    body = {"model": "demo", "messages": [{"role": "user", "content": content(images["flat"])}]}
    response = pruning.post("/v1/chat/completions", body | {"eadaprune": {"energy": 7}})
    assert response.status_code == 400
    assert (
        "eadaprune.energy=7 is not allowed; it must be a number greater than 0" in response.json()["error"]["message"]
    )


def test_preview(pruning: Server, reference: Reference, images: Images) -> None:
    body = {"messages": [{"role": "user", "content": content(images["coffee"])}], "eadaprune": ENERGY}
    found = pruning.post("/v1/eadaprune/preview", body | {"overlay": True}).json()
    assert found["kept_tokens"] == len(reference.kept(images["coffee"], **ENERGY))
    assert found["images"][0]["overlay"].startswith("data:image/jpeg;base64,")


def test_messages(pruning: Server, images: Images) -> None:
    response = pruning.post("/v1/messages", anthropic(images, eadaprune=ENERGY, max_tokens=1))
    report = response.json()["eadaprune"]["images"]
    assert [image["energy_threshold"] for image in report] == [0.9, 0.9]


def test_a_paused_server(pruning: Server) -> None:
    """Until 0.32 requests wait, and with them questions about images, unless their client goes away; since then both
    are refused."""
    body = {"model": "demo", "messages": [{"role": "user", "content": content(noise(7002))}], "max_tokens": 1}
    given_up = {"messages": [{"role": "user", "content": content(noise(7001))}]}
    before = pruning.metric("eadaprune_images_total")
    encoded = pruning.metric("eadaprune_stage_seconds_count", stage="encode")
    refuses = hasattr(EngineCoreProc, "_reject_add_while_paused")
    with ThreadPoolExecutor() as pool:
        assert httpx.post(f"{pruning.url}/pause", timeout=120).status_code == 200
        try:
            asked = [
                pool.submit(pruning.post, path, body) for path in ("/v1/chat/completions", "/v1/eadaprune/preview")
            ]
            with suppress(httpx.ReadTimeout):
                httpx.post(f"{pruning.url}/v1/eadaprune/preview", json=given_up, timeout=3)
            assert len(wait(asked, timeout=120 if refuses else 5).done) == (2 if refuses else 0)
        finally:
            assert httpx.post(f"{pruning.url}/resume", timeout=120).status_code == 200
        assert [each.result().status_code for each in asked] == [503 if refuses else 200] * 2
    assert pruning.post("/v1/chat/completions", body).status_code == 200
    assert pruning.metric("eadaprune_images_total") == before + (1 if refuses else 2)
    assert pruning.metric("eadaprune_stage_seconds_count", stage="encode") == encoded + (1 if refuses else 2)


def test_openapi(pruning: Server) -> None:
    """What vLLM says of its route stays, with what is ours beside it."""
    app = FastAPI()
    app.include_router(router)
    stock, ours = (
        document["paths"]["/v1/chat/completions"]["post"]
        for document in (app.openapi(), httpx.get(f"{pruning.url}/openapi.json", timeout=120).json())
    )
    answers, our_answers = (operation["responses"]["200"]["content"] for operation in (stock, ours))
    assert our_answers.keys() == answers.keys()
    answer, our_answer = (contents["application/json"]["schema"] for contents in (answers, our_answers))
    assert answer.items() <= our_answer.items()
    if "$ref" in answer:  # since 0.33
        assert our_answer["$ref"] == "#/components/schemas/ChatCompletionResponse"
    assert "kept_tokens" in our_answer["properties"]["eadaprune"]["properties"]
    request = ours["requestBody"]["content"]["application/json"]["schema"]
    assert request["$ref"] == "#/components/schemas/ChatCompletionRequest"
    assert "energy" in request["properties"]["eadaprune"]["properties"]
