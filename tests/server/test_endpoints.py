"""Every endpoint of the server: the field works there, or is refused; it is never ignored."""

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest
from endpoints import (
    BOTH,
    CLASSIFYING,
    EMBEDDING,
    GENERATING,
    OWN,
    TEXT,
    Body,
    Images,
    chat,
    check_bad_options,
    check_options,
    check_parity,
    offered,
    taking_images,
)
from harness import DTYPE, VLLM, Server, content, environment
from shared import Reference

from eadaprune_vllm.http.endpoints import ENDPOINTS


@pytest.mark.parametrize("path", GENERATING)
def test_options_count(pruning: Server, reference: Reference, images: Images, path: str) -> None:
    check_options(pruning, reference, images, path, GENERATING)


@pytest.mark.parametrize("path", GENERATING)
def test_bad_options_are_a_400(pruning: Server, images: Images, path: str) -> None:
    check_bad_options(pruning, images, path, GENERATING)


@pytest.mark.parametrize("path", GENERATING)
def test_answers_are_stocks(pruning: Server, stock: Server, images: Images, path: str) -> None:
    check_parity(pruning, stock, images, path, GENERATING)


def test_no_other_endpoint_takes_images(pruning: Server) -> None:
    """Derendering takes the request along, and does not look at its images."""
    assert taking_images(pruning) - {"/v1/chat/completions/derender"} == offered(pruning) - {"/invocations"}
    assert offered(pruning) == {*GENERATING, "/v1/systemone"}
    assert {*ENDPOINTS} == {*GENERATING, *EMBEDDING, *CLASSIFYING, "/v1/systemone"}


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "text", "text": "hi", "eadaprune": {}}, "belongs to the request, or to a content part that is an im"),
        ({"type": "image", "source": {}, "eadaprune": {}}, "is given for an image without data"),
    ],
)
def test_options_on_other_blocks_of_a_message_are_a_400(pruning: Server, part: Body, words: str) -> None:
    body = {"model": "demo", "max_tokens": 1, "messages": [{"role": "user", "content": [part]}]}
    response = pruning.post("/v1/messages", body)
    assert response.status_code == 400
    assert f"eadaprune {words}" in response.text


TOKENS = {"model": "demo", "token_ids": [5, 6], "sampling_params": {"max_tokens": 1}}
REFUSING: dict[str, Body] = {
    "/v1/completions": {"model": "demo", "prompt": "hi", "max_tokens": 1},
    "/v1/completions/render": {"model": "demo", "prompt": "hi", "max_tokens": 1},
    "/inference/v1/generate": TOKENS,
    "/tokenize": {"model": "demo", "prompt": "hi"},
    "/detokenize": {"model": "demo", "tokens": [5]},
    "/invocations": {"model": "demo", "prompt": "hi", "max_tokens": 1},
    "/v1/systemone": {"model": "demo", "state": "", "questions": {}},
    "/generative_scoring": {"model": "demo", "query": "a", "items": ["b"], "label_token_ids": [5, 6]},
}
if importlib.util.find_spec("vllm.entrypoints.openai.decisions"):  # since 0.33
    REFUSING["/v1/decisions"] = {"model": "demo", "input": "hi", "questions": []}


@pytest.mark.parametrize("path", REFUSING)
def test_the_field_is_refused(pruning: Server, path: str) -> None:
    before = pruning.metric("eadaprune_rejected_requests_total", reason="options")
    response = pruning.post(path, REFUSING[path] | {"eadaprune": {"energy": 0.5}})
    assert response.status_code == 400
    assert "eadaprune does nothing" in response.json()["error"]["message"]
    assert response.json()["error"]["param"] == "eadaprune"
    assert pruning.metric("eadaprune_rejected_requests_total", reason="options") == before + 1
    if path not in ("/v1/systemone", "/v1/decisions"):  # which vLLM does not offer for this model
        assert pruning.post(path, REFUSING[path] | {"eadaprune": None}).status_code == 200


def test_generate_refuses_it_on_parts_and_serves_what_was_rendered(
    pruning: Server, images: Images, reference: Reference
) -> None:
    image = images["astronaut"]
    url = content(image)[0]["image_url"]["url"]
    parts = [{"type": "image_url", "url": url, "eadaprune": {"energy": 0.5}}]
    response = pruning.post("/inference/v1/generate", TOKENS | {"content_parts": parts})
    assert (
        "eadaprune does nothing at /inference/v1/generate: this request takes no" in response.json()["error"]["message"]
    )
    body = {"model": "demo", "messages": [{"role": "user", "content": content(image, TEXT)}], "max_tokens": 4}
    prompt = pruning.post("/v1/chat/completions/render", body | {"eadaprune": {"energy": 0.9}, "temperature": 0}).json()
    answer = pruning.post("/inference/v1/generate", prompt).json()
    assert answer["usage"]["prompt_tokens"] == pruning.prompt_tokens(image, TEXT, options={"energy": 0.9})


def test_run_batch(model: Path, images: Images, reference: Reference, tmp_path: Path) -> None:
    bodies = [
        chat(images, eadaprune=BOTH, max_tokens=1),
        chat(images, own=None, max_tokens=1),
        chat(images, own={"energy": 7}, max_tokens=1),
        chat(images, own=None, extra_body={"eadaprune": BOTH}, max_tokens=1),
    ]
    lines = [
        {"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": body}
        for number, body in enumerate(bodies)
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)))
    flags = ["--served-model-name", "demo", "--max-model-len", "2048", "--enforce-eager", "--dtype", DTYPE]
    flags += ["--plugin", "eadaprune", "--eadaprune-energy", "0.95", "--limit-mm-per-prompt", '{"image": 4}']
    done = subprocess.run(
        [VLLM, "run-batch", "-i", str(source), "-o", str(target), "--model", str(model), "--block-size", "32", *flags],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {line["custom_id"]: line for line in map(json.loads, target.read_text().splitlines())}
    kept = [len(reference.kept(images[n], **options)) for n, options in (("astronaut", BOTH), ("noise", BOTH | OWN))]
    report = found["0"]["response"]["body"]["eadaprune"]
    assert [image["kept_tokens"] for image in report["images"]] == kept
    assert [image["energy_threshold"] for image in found["1"]["response"]["body"]["eadaprune"]["images"]] == [0.95] * 2
    assert found["2"]["response"]["status_code"] == 400
    assert "images[1].eadaprune.energy=7 is not allowed" in found["2"]["error"]["error"]["message"]
    assert found["3"]["response"]["status_code"] == 400
    assert "eadaprune does nothing in extra_body" in found["3"]["error"]["error"]["message"]
