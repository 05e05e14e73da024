"""An embedding server: images of its requests are pruned too, and routes that cannot say how refuse the field."""

from collections.abc import Callable

import httpx
import pytest
from harness import Server, content
from PIL import Image

Images = dict[str, Image.Image]
QUESTION = "What is it?"


@pytest.fixture(scope="module")
def pooling(start: Callable[..., Server]) -> Server:
    """An embedding server with random weights, another cache, another plugin, and clients it was told to trust."""
    flags = ["--plugin", "eadaprune", "--plugin", "lora_filesystem_resolver", "--runner", "pooling"]
    flags += ["--load-format", "dummy", "--enforce-eager", "--mm-processor-cache-type", "shm"]
    flags += ["--eadaprune-report-cached"]
    return start("pooling", *flags, "--trust-request-mm-kwargs")


def test_embeddings_of_images(pooling: Server, images: Images) -> None:
    def embed(**options: object) -> httpx.Response:
        messages = [{"role": "user", "content": content(images["noise"], QUESTION)}]
        body = {"model": "demo", "messages": messages, "eadaprune": options}
        return pooling.post("/v1/embeddings", body)

    full, pruned, again = (embed(energy=energy).json() for energy in (1.0, 0.5, 0.5))
    assert pruned["usage"]["prompt_tokens"] < full["usage"]["prompt_tokens"] - 100
    assert pruned["data"] == again["data"]
    assert pooling.metric("eadaprune_images_total") == 3
    assert pruned["eadaprune"]["images"][0]["energy_threshold"] == 0.5
    assert pruned["eadaprune"]["kept_tokens"] < full["eadaprune"]["kept_tokens"] == 576
    assert again["eadaprune"]["images"][0]["cached"]
    refused = embed(energy=2)
    assert refused.status_code == 400
    assert "eadaprune.energy=2 is not allowed" in refused.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/pooling", "/v1/embeddings"])
def test_images_of_a_pooling_request_have_options_of_their_own(pooling: Server, images: Images, path: str) -> None:
    parts = content(images["noise"], QUESTION)
    parts[0]["eadaprune"] = {"energy": 0.6}
    body = {"model": "demo", "messages": [{"role": "user", "content": parts}], "eadaprune": {"energy": 0.8}}
    response = pooling.post(path, body)
    assert response.json()["eadaprune"]["images"][0]["energy_threshold"] == 0.6
    assert response.headers["X-EAdaPrune-Kept-Tokens"] == str(response.json()["eadaprune"]["kept_tokens"])
    text = pooling.post(path, {"model": "demo", "input": "hi", "eadaprune": {"energy": 0.8}})
    assert text.status_code == 400
    assert "eadaprune does nothing here: this request takes no images" in text.json()["error"]["message"]
    parts[0]["eadaprune"] = {"energy": 6}
    assert pooling.post(path, body).json()["error"]["param"] == "images[0].eadaprune.energy"


@pytest.mark.parametrize("path", ["/v2/embed", "/score", "/v1/score", "/rerank", "/v1/rerank", "/invocations"])
def test_other_pooling_routes_refuse_the_field(pooling: Server, images: Images, path: str) -> None:
    part = content(images["flat"])[0]
    pair = {"model": "demo", "query": "a", "documents": ["b"], "data_1": "a", "data_2": "b", "inputs": []}
    for change in (
        {"eadaprune": {"energy": 0.5}},
        {"data_2": {"content": [part | {"eadaprune": {"energy": 0.5}}]}},
        {"mm_processor_kwargs": {"eadaprune": {"energy": 0.5}}},
    ):
        response = pooling.post(path, pair | change)
        assert response.status_code == 400
        assert f"eadaprune does nothing at {path}" in response.json()["error"]["message"]
