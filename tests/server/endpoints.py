"""The endpoints that take images: bodies for each, and what holds at all of them."""

import math
from collections.abc import Callable, Iterator
from typing import Any

from harness import Server, content
from PIL import Image
from shared import Reference

from eadaprune_vllm.http.endpoints import ENDPOINTS

Images = dict[str, Image.Image]
Body = dict[str, Any]
BOTH, OWN = {"energy": 0.99}, {"energy": 0.9, "min_tokens": 4}  # the request's options, and one image's
TEXT = "What is it?"
# Of answers, which differ from one request to the next, or between servers.
VOLATILE = {"id", "request_id", "created", "created_at", "completed_at", "system_fingerprint", "eadaprune"}


def parts(images: Images, own: object = OWN) -> list[Any]:
    """Two images, of which the second has options of its own."""
    first, second = content(images["astronaut"], images["noise"])
    return [first, second if own is None else second | {"eadaprune": own}]


def chat(images: Images, own: object = OWN, **extra: Any) -> Body:
    messages = [{"role": "user", "content": [*parts(images, own), *content(TEXT)]}]
    return {"model": "demo", "messages": messages, **extra}


def batch(images: Images, own: object = OWN, **extra: Any) -> Body:
    messages = [[{"role": "user", "content": [image, *content(TEXT)]}] for image in parts(images, own)]
    return {"model": "demo", "messages": messages, **extra}


def responses(images: Images, own: object = OWN, **extra: Any) -> Body:
    given = [
        part | {"type": "input_image", "image_url": part["image_url"]["url"], "detail": "auto"}
        for part in parts(images, own)
    ]
    message = {"role": "user", "content": [*given, {"type": "input_text", "text": TEXT}]}
    return {"model": "demo", "input": [message], **extra}


def anthropic(images: Images, own: object = OWN, **extra: Any) -> Body:
    """The second image is the result of a tool."""
    first, second = (
        part
        | {
            "type": "image",
            "source": {"type": "base64", "media_type": "image/png", "data": part["image_url"]["url"].split(",")[1]},
        }
        for part in parts(images, own)
    )
    result = {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "a"}, second]}
    turns = [
        {"role": "user", "content": [first, {"type": "text", "text": TEXT}]},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "look", "input": {}}]},
        {"role": "user", "content": [result]},
    ]
    return {"model": "demo", "system": "Be brief.", "messages": turns, **extra}


def contents(images: Images, own: object = OWN) -> list[Any]:
    return [{"content": [image, *content(TEXT)]} for image in parts(images, own)]


def score(images: Images, own: object = OWN, **extra: Any) -> Body:
    return {"model": "demo", "data_1": TEXT, "data_2": contents(images, own), **extra}


def rerank(images: Images, own: object = OWN, **extra: Any) -> Body:
    return {"model": "demo", "query": TEXT, "documents": contents(images, own), **extra}


def cohere(images: Images, own: object = OWN, **extra: Any) -> Body:
    return {"model": "demo", "inputs": contents(images, own), **extra}


Table = dict[str, tuple[Callable[..., Body], Body]]
SHORT = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}
GENERATING: Table = {
    "/v1/chat/completions": (chat, SHORT),
    "/v1/chat/completions/batch": (batch, SHORT),
    "/v1/chat/completions/render": (chat, SHORT),
    "/v1/responses": (responses, {"max_output_tokens": 4, "temperature": 0}),
    "/v1/responses/render": (responses, {"max_output_tokens": 4}),
    "/v1/messages": (anthropic, {"max_tokens": 4, "temperature": 0}),
    "/v1/messages/count_tokens": (anthropic, {}),
    "/v1/messages/render": (anthropic, {"max_tokens": 4}),
    "/tokenize": (chat, {}),
    "/invocations": (chat, SHORT),
}
_SCORING: Table = {
    "/score": (score, {}),
    "/v1/score": (score, {}),
    "/rerank": (rerank, {}),
    "/v1/rerank": (rerank, {}),
    "/v2/rerank": (rerank, {}),
    "/tokenize": (chat, {}),
    "/pooling": (chat, {}),
}
EMBEDDING = _SCORING | {"/v1/embeddings": (batch, {}), "/v2/embed": (cohere, {}), "/invocations": (chat, {})}
CLASSIFYING = _SCORING | {"/classify": (chat, {}), "/invocations": (rerank, {})}


def check_options(server: Server, reference: Reference, images: Images, path: str, table: Table) -> None:
    """The field, an image's own options and the header count, and the report says so. The server's energy is 0.95."""
    build, extra = table[path]
    kept = [len(reference.kept(images[n], **options)) for n, options in (("astronaut", BOTH), ("noise", BOTH | OWN))]
    response = server.post(path, build(images, eadaprune=BOTH, **extra))
    assert response.status_code == 200, response.text
    assert response.headers["X-EAdaPrune-Visual-Tokens"] == str(2 * 576)
    assert response.headers["X-EAdaPrune-Kept-Tokens"] == str(sum(kept))
    if path.endswith("/render"):
        assert "eadaprune" not in response.json()
    else:
        report = response.json()["eadaprune"]
        assert [image["kept_tokens"] for image in report["images"]] == kept
        assert [image["energy_threshold"] for image in report["images"]] == [0.99, 0.9]
    # Without options of its own, a request gets the header's, and without that the server's.
    for headers, energy in (({"X-EAdaPrune-Energy": "0.8"}, 0.8), ({}, 0.95)):
        response = server.post(path, build(images, own=None, **extra), **headers)
        total = sum(len(reference.kept(images[name], energy=energy)) for name in ("astronaut", "noise"))
        assert response.headers["X-EAdaPrune-Kept-Tokens"] == str(total)


def check_bad_options(server: Server, images: Images, path: str, table: Table) -> None:
    build, extra = table[path]
    for own, request, field in (
        (OWN, {"energy": 7}, "eadaprune.energy"),
        ({"energy": 7}, BOTH, "images[1].eadaprune.energy"),
    ):
        response = server.post(path, build(images, own, eadaprune=request, **extra))
        assert response.status_code == 400
        error = response.json()["error"]
        assert f"{field}=7 is not allowed; it must be a number greater than 0 and at most 1" in error["message"]
        if build is not anthropic:  # whose errors have no such field
            assert error["param"] == field


def check_parity(server: Server, stock: Server, images: Images, path: str, table: Table) -> None:
    """At an energy of 1.0 the answer is stock vLLM's, and below that it is another."""
    build, extra = table[path]
    whole, pruned = (server.post(path, build(images, None, eadaprune={"energy": e}, **extra)) for e in (1, 0.5))
    expected = stock.post(path, build(images, None, **extra))
    assert expected.status_code == 200, expected.text
    found = list(differences(whole.json(), expected.json()))
    assert not found, found
    assert list(differences(pruned.json(), expected.json()))


def differences(first: Any, second: Any, where: str = "") -> Iterator[str]:
    """Where two JSON values differ, but for ``VOLATILE`` and the last digits of numbers."""
    match first, second:
        case dict(), dict():
            for key in (first.keys() | second.keys()) - VOLATILE:
                yield from differences(first.get(key), second.get(key), f"{where}.{key}")
        case list(), list() if len(first) == len(second):
            for number, each in enumerate(zip(first, second, strict=True)):
                yield from differences(*each, f"{where}[{number}]")
        case float(), float() if math.isclose(first, second, rel_tol=1e-4, abs_tol=1e-5):
            pass
        case _ if first != second:
            yield f"{where}: {first!r:.80} {second!r:.80}"


def offered(server: Server) -> set[str]:
    """Our endpoints, of the server's."""
    return {*server.document()["paths"]} & {*ENDPOINTS}


def taking_images(server: Server) -> set[str]:
    """The server's endpoints whose bodies, as it documents them, have a place for images."""
    document = server.document()

    def keys(value: Any, seen: frozenset[str] = frozenset()) -> Iterator[str]:
        match value:
            case {"$ref": str(name)} if name not in seen:
                yield from keys(document["components"]["schemas"][name.rsplit("/", 1)[1]], seen | {name})
            case dict():
                for key, below in value.items():
                    yield key
                    yield from keys(below, seen)
            case list():
                for below in value:
                    yield from keys(below, seen)

    return {
        path
        for path, operations in document["paths"].items()
        for operation in operations.values()
        if {"image_url", "images", "source"} & {*keys(operation.get("requestBody"))}
    }
