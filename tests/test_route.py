"""The route class on a small application: what goes in, what comes out, and what stays behind."""

import asyncio
import gc
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from prometheus_client import CollectorRegistry
from pydantic import BaseModel
from vllm.exceptions import VLLMValidationError

from eadaprune_vllm.core.item_report import ItemReport
from eadaprune_vllm.core.report import Pruning
from eadaprune_vllm.frontend.client import DecisionClient
from eadaprune_vllm.frontend.context import RequestContext, current, in_context
from eadaprune_vllm.frontend.front_end import FrontEnd
from eadaprune_vllm.frontend.metrics import Metrics
from eadaprune_vllm.http.route import PruningRoute, openapi_extra

CHAT, OTHER, RENDER = "/v1/chat/completions", "/v1/completions", "/v1/chat/completions/render"
IMAGE = ItemReport(
    visual_tokens=576,
    kept_tokens=76,
    energy_threshold=0.9,
    energy_requested=0.9,
    spectral_energy=0.91,
    span_energy=0.82,
    selector="span",
)


class Body(BaseModel):
    """As vLLM's: what is not declared is dropped here."""

    messages: list[Any] = []
    input: list[Any] = []
    system: list[Any] = []
    stream: bool = False
    wait: bool = False
    empty: bool = False
    images: int = 1


@pytest.fixture
def app() -> FastAPI:
    app = FastAPI()
    front_end = FrontEnd(DecisionClient(1), Metrics(CollectorRegistry()), "m", 1)
    app.state.eadaprune = SimpleNamespace(front_end=front_end)

    async def handler(body: Body) -> Any:
        context = current()
        if body.images:
            context.prunings.append(Pruning({"image": [IMAGE] * body.images}, 0.25, kv_bytes_per_token=10))
        if body.wait:
            await asyncio.sleep(60)
        if body.stream:
            return StreamingResponse(events(body.empty), media_type="text/event-stream")
        if body.empty:
            return {}
        return {"options": context.options, "header": context.header}

    async def events(empty: bool) -> AsyncIterator[str]:
        yield ": keep-alive\n\n"
        if empty:
            yield "data: {}\n\n"
        for number in range(3):
            yield f'event: x\ndata: {{"number": {number}}}\n\n'
        yield "data: [DONE]\n\n"

    for path in (CHAT, OTHER, RENDER, "/v1/messages", "/v1/responses"):
        app.router.add_api_route(path, handler, methods=["POST"], route_class_override=PruningRoute)
    return app


class Text(BaseModel):
    """As vLLM's ``/v1/embeddings`` takes it for token embeddings."""

    input: str


def post(app: FastAPI, path: str, *bodies: Any, **settings: Any) -> list[httpx.Response]:
    async def all_of_them() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app, raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return [await client.post(path, json=body, **settings) for body in bodies]

    return asyncio.run(all_of_them())


def test_field_and_header_go_in_and_the_report_comes_out(app: FastAPI) -> None:
    body = {"messages": [], "eadaprune": {"energy": 0.5}, "images": 2}
    (response,) = post(app, CHAT, body, headers={"x-eadaprune-energy": "0.7"})
    found = response.json()
    assert list(found) == ["options", "header", "eadaprune"]
    assert (found["options"], found["header"]) == ({"energy": 0.5}, "0.7")
    report = found["eadaprune"]
    assert report["images"] == [IMAGE.model_dump()] * 2
    assert [report[name] for name in ("visual_tokens", "kept_tokens", "tokens_saved")] == [1152, 152, 1000]
    assert report["kv_cache_bytes_saved"] == 10_000
    assert report["seconds"] == 0.25
    assert response.headers["X-EAdaPrune-Visual-Tokens"] == "1152"
    assert response.headers["X-EAdaPrune-Kept-Tokens"] == "152"


def test_the_report_is_in_the_first_event_and_only_there(app: FastAPI) -> None:
    (response,) = post(app, CHAT, {"stream": True})
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    first, *others = [json.loads(line) for line in lines[:-1]]
    assert first.pop("eadaprune")["kept_tokens"] == 76
    assert [first, *others] == [{"number": number} for number in range(3)]
    assert response.text.startswith(": keep-alive\n\nevent: x\ndata: {")
    assert lines[-1] == "[DONE]"
    assert response.headers["X-EAdaPrune-Kept-Tokens"] == "76"


@pytest.mark.parametrize("start", ['"type":"message_start","message":', '"response":'])
def test_the_report_is_in_the_answers_that_a_stream_holds(start: str) -> None:
    """SDKs make their last message of these. What looks like one in a text is left alone."""
    text = json.dumps({"delta": f'data: {{{start}{{"a":1}}}}'}, separators=(",", ":"))

    async def events() -> AsyncIterator[str]:
        for data in (f'{{{start}{{"a":1}},"b":2}}', text, f'{{{start}{{"a":3}}}}'):
            yield f"event: x\ndata: {data}\n\n"

    async def handler(body: Body) -> StreamingResponse:
        current().prunings.append(Pruning({"image": [IMAGE]}, 0.25, kv_bytes_per_token=10))
        return StreamingResponse(events(), media_type="text/event-stream")

    app = FastAPI()
    app.router.add_api_route("/v1/messages", handler, methods=["POST"], route_class_override=PruningRoute)
    (response,) = post(app, "/v1/messages", {})
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    first, middle, last = map(json.loads, lines)
    name = start.split('"')[-2]
    assert first[name] == {"eadaprune": first["eadaprune"], "a": 1}
    assert first["eadaprune"]["kept_tokens"] == 76
    assert first["b"] == 2
    assert middle == json.loads(text)
    assert last[name] == {"eadaprune": first["eadaprune"], "a": 3}


def test_later_turns_of_a_stream_have_the_options() -> None:
    """As where built-in tools are called: their output goes into another prompt. Each stream has its own."""
    turns: dict[str | None, list[str | None]] = {"0.5": [], "0.7": []}

    async def handler(body: Body) -> StreamingResponse:
        pruning, found = Pruning({"image": [IMAGE]}, 0.25, kv_bytes_per_token=10), turns[current().header]
        current().prunings.append(pruning)

        async def events() -> AsyncIterator[str]:
            try:
                for number in range(2):
                    await both.wait()
                    found.append(current().header)
                    current().prunings.append(pruning)
                    yield f'data: {{"number": {number}}}\n\n'
            finally:
                found.append(current().header)

        return StreamingResponse(events(), media_type="text/event-stream")

    async def ask_both() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            headers = [{"X-EAdaPrune-Energy": str(energy)} for energy in turns]
            return await asyncio.gather(*(client.post("/v1/responses", json={}, headers=each) for each in headers))

    both, app = asyncio.Barrier(2), FastAPI()
    app.router.add_api_route("/v1/responses", handler, methods=["POST"], route_class_override=PruningRoute)
    for response in asyncio.run(ask_both()):
        assert response.headers["X-EAdaPrune-Kept-Tokens"] == "76"
        assert response.text.count('"kept_tokens":76') == 2  # of the request, and of its image
    assert turns == {energy: [energy] * 3 for energy in ("0.5", "0.7")}


def test_the_context_of_a_stream_ends_with_it() -> None:
    """A consumer has its own between two chunks, also if it leaves early."""

    async def chunks() -> AsyncIterator[object]:
        while True:
            yield current().options

    async def consume() -> None:
        stream = in_context(chunks(), RequestContext(options=1))
        async for seen in stream:
            assert (seen, current().options) == (1, None)
            break
        await stream.aclose()
        assert current().options is None

    asyncio.run(consume())


def test_empty_json_object_gets_the_report(app: FastAPI) -> None:
    whole, streamed = post(app, CHAT, {"empty": True}, {"empty": True, "stream": True})
    assert whole.json().keys() == {"eadaprune"}
    assert int(whole.headers["content-length"]) == len(whole.content)
    events = [line[6:] for line in streamed.text.splitlines() if line.startswith("data: ")]
    first, second = map(json.loads, events[:2])
    assert first.keys() == {"eadaprune"}
    assert second == {"number": 0}


def test_the_type_of_a_body_may_be_written_in_capitals(app: FastAPI) -> None:
    (response,) = post(
        app, CHAT, {"messages": [], "eadaprune": {"energy": 0.5}}, headers={"Content-Type": "Application/JSON"}
    )
    assert response.json()["options"] == {"energy": 0.5}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "eadaprune": {}}]}]}),
        (CHAT, {"messages": [{"role": "user", "eadaprune": {}}]}),
        ("/v1/responses", {"input": [{"type": "function_call_output", "output": [], "eadaprune": {}}]}),
        ("/v1/messages", {"messages": [], "system": [{"type": "text", "text": "a", "eadaprune": {}}]}),
        ("/v1/messages", {"messages": [{"content": [{"type": "image", "source": {"eadaprune": {}}}]}]}),
    ],
)
def test_options_in_the_wrong_place_are_refused(app: FastAPI, path: str, body: Any) -> None:
    with pytest.raises(
        VLLMValidationError, match="eadaprune belongs to the request, or to a content part that is an image"
    ):
        post(app, path, body)


def test_extra_body_is_an_argument_of_sdks_and_no_field(app: FastAPI) -> None:
    with pytest.raises(VLLMValidationError, match="eadaprune does nothing in extra_body, which is an argument of SDKs"):
        post(app, CHAT, {"messages": [], "extra_body": {"eadaprune": {"energy": 0.5}}})
    assert post(app, CHAT, {"messages": [], "extra_body": {"other": "eadaprune"}})[0].status_code == 200


def test_options_in_mm_processor_kwargs_are_rejected_if_the_body_has_no_such_field(app: FastAPI) -> None:
    with pytest.raises(VLLMValidationError, match=f"eadaprune does nothing in mm_processor_kwargs at {CHAT}"):
        post(app, CHAT, {"messages": [], "mm_processor_kwargs": {"eadaprune": {"energy": 0.5}}})
    assert post(app, CHAT, {"messages": [], "mm_processor_kwargs": {"other": 1}})[0].status_code == 200


def test_rendered_bodies_are_not_changed(app: FastAPI) -> None:
    (response,) = post(app, RENDER, {})
    assert response.json().keys() == {"options", "header"}
    assert response.headers["X-EAdaPrune-Kept-Tokens"] == "76"


def test_no_images_no_report(app: FastAPI) -> None:
    (response,) = post(app, CHAT, {"images": 0})
    assert response.json().keys() == {"options", "header"}
    assert not [name for name in response.headers if "eadaprune" in name]


@pytest.mark.parametrize("body", [{"eadaprune": {}}, {"parts": [{"type": "image_url", "eadaprune": {"energy": 1}}]}])
def test_requests_without_images_refuse_the_field(app: FastAPI, body: Any) -> None:
    for path in (OTHER, CHAT):
        with pytest.raises(
            VLLMValidationError, match=f"eadaprune does nothing at {path}: this request takes no images"
        ):
            post(app, path, body)
    for allowed in ({}, {"eadaprune": None}, {"prompt": "eadaprune"}):
        assert post(app, OTHER, allowed)[0].status_code == 200


def test_derendering_takes_the_request_as_it_was_rendered(app: FastAPI) -> None:
    path = "/v1/chat/completions/derender"

    async def handler(body: dict[str, Any]) -> None: ...

    app.router.add_api_route(path, handler, methods=["POST"], route_class_override=PruningRoute)
    assert post(app, path, {"chat_request": {"eadaprune": {"energy": 0.5}}})[0].status_code == 200
    with pytest.raises(VLLMValidationError, match=f"eadaprune does nothing at {path}"):
        post(app, path, {"chat_request": {}, "eadaprune": {"energy": 0.5}})


@pytest.mark.parametrize("body", [rb'{"\u0065adaprune": {}}', '{"eadaprune": {}}'.encode("utf-16")])
def test_field_is_rejected_in_any_json_encoding(app: FastAPI, body: bytes) -> None:
    async def send() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            await client.post(OTHER, content=body, headers={"content-type": "application/json"})

    with pytest.raises(VLLMValidationError, match=f"eadaprune does nothing at {OTHER}"):
        asyncio.run(send())


def test_an_endpoint_for_text_only_refuses_the_field(app: FastAPI) -> None:
    path = "/v1/embeddings"

    async def handler(body: Text | None) -> str:
        return "answer"

    app.router.add_api_route(path, handler, methods=["POST"], route_class_override=PruningRoute)
    assert openapi_extra(app.routes[-1]) == {}  # type: ignore[arg-type]
    assert post(app, path, {"input": "a"})[0].status_code == 200
    with pytest.raises(VLLMValidationError, match=f"eadaprune does nothing at {path}: this request takes no images"):
        post(app, path, {"input": "a", "eadaprune": {"energy": 0.5}})


def test_other_bodies_are_left_to_fastapi(app: FastAPI) -> None:
    async def send(path: str, content: bytes, kind: str) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.post(path, content=content, headers={"content-type": kind})

    for path in (CHAT, OTHER):
        for content in (b"{", b"\xff", b"[]", b"3", b"", b"[" * 100_000):
            assert asyncio.run(send(path, content, "application/json")).status_code in (400, 422)
        assert asyncio.run(send(path, b"eadaprune=1", "application/x-www-form-urlencoded")).status_code == 422


def test_thousands_of_aborted_requests_leave_nothing_behind(app: FastAPI) -> None:
    async def abort_many() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            for _ in range(20):
                tasks = [asyncio.create_task(client.post(CHAT, json={"wait": True})) for _ in range(100)]
                await asyncio.sleep(0.1)
                assert any(type(thing) is RequestContext for thing in gc.get_objects())
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(abort_many())
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) in (RequestContext, Pruning)]
