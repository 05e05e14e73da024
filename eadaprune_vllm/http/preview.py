"""``POST /v1/eadaprune/preview``: what pruning would do to the images and videos of a chat request."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import aiohttp
from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from PIL.Image import DecompressionBombError
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.api_utils import with_cancellation
from vllm.exceptions import VLLMNotFoundError, VLLMValidationError
from vllm.renderers.chat_utils import AsyncMultiModalItemTracker

from eadaprune_vllm.core.options import KEY, request_schema
from eadaprune_vllm.core.report import Preview
from eadaprune_vllm.core.words import in_words
from eadaprune_vllm.frontend.context import RequestContext
from eadaprune_vllm.frontend.preview import MAX_DETAILED, PreviewItem, check_detailed, iter_preview_items, previews
from eadaprune_vllm.frontend.processor import PruningProcessor
from eadaprune_vllm.frontend.rendering import redacted
from eadaprune_vllm.frontend.request_options import HEADER, choose, item_parts, option_sources


class OwnRoute(APIRoute):
    """A route of ours. It rejects bodies that are not JSON with vLLM's error object, which differs from FastAPI's."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            if self.body_field:
                try:
                    await request.json()
                except (ValueError, RecursionError):
                    raise VLLMValidationError("the body is not JSON", parameter="body") from None
            return await handler(request)

        return handle


router = APIRouter(prefix="/v1/eadaprune", tags=["EAdaPrune"], route_class=OwnRoute)
# Previews are drawn one at a time, on a thread that no request needs.
_drawing = ThreadPoolExecutor(1, "eadaprune-preview")


class Message(BaseModel):
    """A chat message; only the images and videos in its content matter."""

    model_config = ConfigDict(extra="allow")

    content: str | list[str | dict[str, Any]] | None = None


class PreviewRequest(BaseModel):
    """A chat request; fields that concern generation are ignored."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    messages: list[Message]
    eadaprune: Annotated[Any, WithJsonSchema(request_schema())] = None
    overlay: bool = Field(
        default=False, description=f"Whether to draw what is kept. For at most {MAX_DETAILED} images and videos."
    )
    spectrum: bool = Field(
        default=False,
        description=f"Whether to include the whole spectrum. For at most {MAX_DETAILED} images and videos.",
    )


@router.post("/preview", response_model=Preview, responses={code: {"model": ErrorResponse} for code in (400, 404, 500)})
async def preview(body: PreviewRequest, request: Request) -> Any:
    """What pruning would do to the images and videos of a chat request. Nothing is generated."""
    return await _preview(body, request) or Response(status_code=499)


@with_cancellation  # type: ignore[untyped-decorator]
async def _preview(body: PreviewRequest, request: Request) -> Response:
    """The response; None if the client disconnects."""
    state = request.app.state
    models = state.openai_serving_models
    if body.model and not models.is_base_model(body.model) and body.model not in models.lora_requests:
        raise VLLMNotFoundError(f"The model `{body.model}` does not exist.")
    processor = state.eadaprune
    messages = [message.model_dump() for message in body.messages]
    extra = body.model_extra or {}
    with processor.front_end.refusals("preview"):
        context = RequestContext(request.headers.get(HEADER), body.eadaprune)
        sources = option_sources(context, extra.get("mm_processor_kwargs"))
        choices = choose(processor.server_options, sources, messages, context.item_counts)
    for name in ("mm_processor_kwargs", "media_io_kwargs"):
        given = extra.get(name)
        if given and not (isinstance(given, dict) and given.keys() == {KEY}):
            raise VLLMValidationError(
                f"previews do not support {name}: they process images with the server's defaults", parameter=name
            )
    check_detailed(choices, overlay=body.overlay, spectrum=body.spectrum)
    fetched = await _fetch(state.eadaprune_renderer.model_config, messages)
    found, items = iter_preview_items(processor, fetched, choices), list[PreviewItem]()
    loop = asyncio.get_running_loop()
    batch, remaining = dict[PreviewItem, None](), processor.front_end.decision_client.max_batch_tokens
    while item := await loop.run_in_executor(state.eadaprune_renderer._mm_executor, next, found, None):
        items.append(item)
        if item.pending.response or item in batch:
            continue
        batch[item] = None
        remaining -= item.pending.request.num_placeholders
        if remaining <= 0:  # decide now, which frees the pixels
            await processor.front_end.decide([each.pending for each in batch], "preview")
            batch, remaining = {}, processor.front_end.decision_client.max_batch_tokens
    await processor.front_end.decide([each.pending for each in batch], "preview")
    content = await loop.run_in_executor(_drawing, _preview_json, processor, items, body)
    return Response(content, media_type="application/json")


def _preview_json(processor: PruningProcessor, items: Sequence[PreviewItem], body: PreviewRequest) -> str:
    """The response's body, which may be long."""
    pruning = previews(processor, items, body.overlay, body.spectrum)
    return Preview.of([redacted(processor.server_options, pruning)]).model_dump_json()


async def _fetch(model_config: Any, messages: list[Any]) -> Mapping[str, Any]:
    """The images and videos of a request by modality, within vLLM's own limits."""
    tracker = AsyncMultiModalItemTracker(model_config)
    parser = tracker.create_parser()
    for modality, part in item_parts(messages):
        url = part.get(f"{modality}_url")
        url = url.get("url") if isinstance(url, dict) else url
        if not isinstance(url, str) or not url:
            raise VLLMValidationError("a preview needs the URL of every image and video", parameter="messages")
        getattr(parser, f"parse_{modality}")(url)
    try:
        data, _ = await tracker.resolve_items()
    except (aiohttp.ClientError, OSError, DecompressionBombError, RuntimeError, ArithmeticError, ValueError) as error:
        # The last three are raised by decoders.
        raise VLLMValidationError(
            f"an image or video could not be read: {in_words(error)}", parameter="messages"
        ) from None
    return data or {}
