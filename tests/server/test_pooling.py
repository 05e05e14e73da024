"""Servers of embeddings and of classes: the images of their requests are pruned too, at every endpoint."""

from collections.abc import Callable
from pathlib import Path

import pytest
from endpoints import (
    CLASSIFYING,
    EMBEDDING,
    TEXT,
    Images,
    Table,
    chat,
    check_bad_options,
    check_options,
    check_parity,
    cohere,
    contents,
    offered,
    parts,
    rerank,
    score,
    taking_images,
)
from harness import DTYPE, Server
from shared import Reference

POOLING = ["--runner", "pooling", "--enforce-eager", "--dtype", DTYPE]
PRUNING = ["--plugin", "eadaprune", "--eadaprune-energy", "0.95", "--eadaprune-min-tokens", "16"]
PRUNING += ["--eadaprune-detail-low", '{"energy": 0.6, "min_tokens": 4}', "--eadaprune-report-cached"]


@pytest.fixture(scope="module")
def embedding(start: Callable[..., Server]) -> Server:
    """Another cache, another plugin, and clients it was told to trust."""
    flags = [*PRUNING, "--plugin", "lora_filesystem_resolver", "--mm-processor-cache-type", "shm"]
    return start("embedding", *POOLING, *flags, "--trust-request-mm-kwargs")


@pytest.fixture(scope="module")
def classifying(start: Callable[..., Server], scorer: Path) -> Server:
    return start("classifying", *POOLING, "--convert", "classify", *PRUNING, model=scorer)


@pytest.fixture(scope="module")
def stock_embedding(start: Callable[..., Server]) -> Server:
    return start("stock-embedding", *POOLING)


@pytest.fixture(scope="module")
def stock_classifying(start: Callable[..., Server], scorer: Path) -> Server:
    return start("stock-classifying", *POOLING, "--convert", "classify", model=scorer)


CASES = [(kind, path) for kind, table in (("embedding", EMBEDDING), ("classifying", CLASSIFYING)) for path in table]
TABLES: dict[str, Table] = {"embedding": EMBEDDING, "classifying": CLASSIFYING}
all_cases = pytest.mark.parametrize(("kind", "path"), CASES)


@all_cases
def test_options_count(
    request: pytest.FixtureRequest, reference: Reference, images: Images, kind: str, path: str
) -> None:
    check_options(request.getfixturevalue(kind), reference, images, path, TABLES[kind])


@all_cases
def test_bad_options_are_a_400(request: pytest.FixtureRequest, images: Images, kind: str, path: str) -> None:
    check_bad_options(request.getfixturevalue(kind), images, path, TABLES[kind])


@all_cases
def test_answers_are_stocks(request: pytest.FixtureRequest, images: Images, kind: str, path: str) -> None:
    server, stock = request.getfixturevalue(kind), request.getfixturevalue(f"stock_{kind}")
    check_parity(server, stock, images, path, TABLES[kind])


@pytest.mark.parametrize("kind", TABLES)
def test_no_other_endpoint_takes_images(request: pytest.FixtureRequest, kind: str) -> None:
    server = request.getfixturevalue(kind)
    assert taking_images(server) == offered(server) - {"/invocations"}
    assert offered(server) == {*TABLES[kind], "/v1/systemone"}  # which no model with pooling has


def test_detail_counts(embedding: Server, classifying: Server, reference: Reference, images: Images) -> None:
    kept = [len(reference.kept(images["astronaut"], energy=0.95))]
    kept += [len(reference.kept(images["noise"], energy=0.6, min_tokens=4))]
    for server, path, body in (
        (embedding, "/score", score(images, None)),
        (embedding, "/v2/embed", cohere(images, None)),
        (classifying, "/rerank", rerank(images, None)),
    ):
        for place in body.get("inputs") or body.get("documents") or body["data_2"]:
            place["content"][0]["image_url"]["detail"] = "auto"
        place["content"][0]["image_url"]["detail"] = "low"
        report = server.post(path, body).json()["eadaprune"]
        assert [image["kept_tokens"] for image in report["images"]] == kept


def test_images_of_a_query_are_in_every_prompt_of_a_cross_encoder(
    embedding: Server, classifying: Server, images: Images
) -> None:
    query, document = contents(images, None)
    body = {"model": "demo", "query": query, "documents": ["text", document], "eadaprune": {"energy": 0.9}}
    for server, count in ((embedding, 2), (classifying, 3)):
        response = server.post("/rerank", body).json()
        assert len(response["eadaprune"]["images"]) == count
        assert response["usage"]["prompt_tokens"] > response["eadaprune"]["kept_tokens"]


def test_text_prompts_of_a_chat_accept_its_options(embedding: Server, images: Images) -> None:
    """Of one request: a text and a picture."""
    body = {"model": "demo", "data_1": TEXT, "data_2": contents(images, None)[0], "eadaprune": {"energy": 1}}
    report = embedding.post("/score", body).json()["eadaprune"]
    assert report["kept_tokens"] == 576


def test_report_says_what_is_cached(embedding: Server, images: Images) -> None:
    body = chat(images, None, eadaprune={"energy": 0.71})
    first, again = (embedding.post("/v1/embeddings", body).json() for _ in range(2))
    assert first["data"] == again["data"]
    assert [image["cached"] for image in first["eadaprune"]["images"]] == [False, False]
    assert [image["cached"] for image in again["eadaprune"]["images"]] == [True, True]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/pooling", {"input": "hi"}),
        ("/v1/embeddings", {"input": "hi"}),
        ("/invocations", {"input": "hi"}),
        ("/v2/embed", {"texts": ["hi"]}),
        ("/tokenize", {"prompt": "hi"}),
    ],
)
def test_texts_refuse_the_field(embedding: Server, path: str, body: dict[str, object]) -> None:
    response = embedding.post(path, {"model": "demo", "eadaprune": {"energy": 0.8}} | body)
    assert response.status_code == 400
    assert "eadaprune does nothing" in response.json()["error"]["message"]
    assert "this request takes no images" in response.json()["error"]["message"]


def test_mm_processor_kwargs_may_have_the_options(embedding: Server, images: Images) -> None:
    kwargs = {"mm_processor_kwargs": {"eadaprune": {"energy": 0.6}}}
    report = embedding.post("/score", score(images, None) | kwargs).json()["eadaprune"]
    assert [image["energy_threshold"] for image in report["images"]] == [0.6, 0.6]
    refused = embedding.post("/v2/embed", cohere(images, None) | kwargs)
    assert refused.json()["error"]["message"].startswith("eadaprune does nothing in mm_processor_kwargs at /v2/embed")


def test_options_on_texts_are_a_400(embedding: Server, images: Images) -> None:
    text = {"type": "text", "text": TEXT, "eadaprune": {"energy": 0.5}}
    for path, field in (("/score", "data_2"), ("/v2/embed", "inputs")):
        body = {"model": "demo", "data_1": TEXT, field: [{"content": [*parts(images), text]}]}
        response = embedding.post(path, body)
        assert response.status_code == 400
        assert "eadaprune belongs to the request, or to a content part that is an image" in response.text
