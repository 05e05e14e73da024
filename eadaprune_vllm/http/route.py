"""vLLM's routes with pruning: they read the field and the header of a request, and add the report to its response.

The routes have vLLM's bodies, checks and handlers; only their class differs.
"""

import re
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from copy import deepcopy
from typing import Any, get_args

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from fastapi.routing import APIRoute
from fastapi.utils import deep_dict_update
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from eadaprune_vllm.core.options import KEY, request_schema
from eadaprune_vllm.core.report import Report
from eadaprune_vllm.errors import InvalidOptionsError
from eadaprune_vllm.frontend.context import RequestContext, in_context, request_context
from eadaprune_vllm.frontend.request_options import HEADER, option_fields, reject_extra_body, reject_misplaced
from eadaprune_vllm.http.endpoints import ENDPOINTS, Endpoint

VISUAL_TOKENS = "X-EAdaPrune-Visual-Tokens"
KEPT_TOKENS = "X-EAdaPrune-Kept-Tokens"
_KWARGS = "mm_processor_kwargs"
# Most bodies do not contain the word, and may be long. JSON may have its letters as escapes, or be in UTF-16.
_WORD = re.compile(KEY.encode() + rb"|\\u00|\x00")
_FIRST_EVENT = re.compile(r"^data: \{(\s*\})?", re.MULTILINE)
# The events with the object that SDKs return at the end of a stream: of Anthropic, and of OpenAI's Responses.
_ANSWER = re.compile(r'^data: \{(?:"type":"message_start","message"|"response"):\{', re.MULTILINE)


class PruningRoute(APIRoute):
    """One of vLLM's routes.

    Modifications:
    - the field ``eadaprune`` and the header ``X-EAdaPrune-Energy`` are put into the request's context
    - an endpoint that takes no options rejects the field
    - the report is added to body and headers of the response
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()
        endpoint = ENDPOINTS[self.path] if takes_options(self) else None

        async def handle(request: Request) -> Response:
            body = await _json(request)
            if body is not None and _WORD.search(await request.body()):
                with request.app.state.eadaprune.front_end.refusals():
                    self._check(body, endpoint)
            if not endpoint:
                return await handler(request)
            options = body.pop(KEY, None) if isinstance(body, dict) else None  # vLLM may reject unknown fields
            with request_context(RequestContext(request.headers.get(HEADER), options, body)) as context:
                response = await handler(request)
            if isinstance(response, StreamingResponse):  # may render further turns, after calls of built-in tools
                response.body_iterator = in_context(aiter(response.body_iterator), context)
            return _with_report(response, context.report(), in_body=endpoint.reports)

        return handle

    def _check(self, body: Any, endpoint: Endpoint | None) -> None:
        """Raises:
        InvalidOptionsError: if the field is in a place where it would be ignored.
        """
        fields = endpoint.fields if endpoint else ()
        if isinstance(body, dict) and not body.keys().isdisjoint(fields):
            reject_misplaced([body.get(field) for field in fields])
            reject_extra_body(body)
            if any(option_fields(body.get(_KWARGS))) and not _has_fields(self, (_KWARGS,)):
                raise InvalidOptionsError(f"{KEY} does nothing in {_KWARGS} at {self.path}", KEY)
            return
        if isinstance(body, dict) and self.path.endswith("/derender"):
            body = body | {"chat_request": None}  # the request that was rendered, with its field
        if any(option_fields(body)):
            raise InvalidOptionsError(f"{KEY} does nothing at {self.path}: this request takes no images or videos", KEY)


def takes_options(route: APIRoute) -> bool:
    """Whether a route takes images and videos. With some pooling tasks an endpoint of the table takes text only."""
    return route.path in ENDPOINTS and _has_fields(route, ENDPOINTS[route.path].fields)


def _has_fields(route: APIRoute, fields: Iterable[str]) -> bool:
    """Whether the route's body has all of these fields, or has no model."""
    if not route.body_field:
        return True
    models = list(_models(route.body_field.field_info.annotation))
    return all(any(field in model.model_fields for model in models) for field in fields)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The pydantic models in a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def openapi_extra(route: APIRoute) -> dict[str, Any]:
    """The ``openapi_extra`` of one of vLLM's routes, with our field, header and report if it takes options."""
    extra = deepcopy(route.openapi_extra or {})
    if takes_options(route):
        deep_dict_update(extra, _own_openapi_extra(ENDPOINTS[route.path].reports))
    return extra


def _own_openapi_extra(reports: bool) -> dict[str, Any]:
    integer = {"schema": {"type": "integer"}}
    response: dict[str, Any] = {"headers": {VISUAL_TOKENS: integer, KEPT_TOKENS: integer}}
    if reports:
        response["content"] = {"application/json": {"schema": {"properties": {KEY: _inline(Report)}}}}
    options = request_schema()
    energy = {"name": HEADER, "in": "header", "required": False, "schema": options["properties"]["energy"]}
    return {
        "parameters": [energy],
        "requestBody": {"content": {"application/json": {"schema": {"properties": {KEY: options}}}}},
        "responses": {"200": response},
    }


def _inline(model: type[Report]) -> dict[str, Any]:
    """The model's schema without ``$ref``, which would not resolve inside another document."""
    schema = model.model_json_schema()
    (item,) = schema.pop("$defs").values()
    for items in ("images", "videos"):
        schema["properties"][items]["items"] = item
    return schema


async def _json(request: Request) -> Any:
    """The request's body, parsed once for this route and for FastAPI; None if it is not JSON."""
    if "json" not in request.headers.get("content-type", "").lower():
        return None
    try:
        return await request.json()
    except (ValueError, RecursionError, ClientDisconnect):
        return None  # FastAPI raises the error


def _with_report(response: Response, report: Report | None, in_body: bool) -> Response:
    """The response with the report of its request, if there is one."""
    if not report or response.status_code != 200:
        return response
    response.headers[VISUAL_TOKENS] = str(report.visual_tokens)
    response.headers[KEPT_TOKENS] = str(report.kept_tokens)
    if not in_body:
        return response
    member = f'"{KEY}":{report.model_dump_json()}'
    if isinstance(response, StreamingResponse):
        response.body_iterator = _with_events(response.body_iterator, member)
    elif response.media_type == "application/json" and bytes(response.body).endswith(b"}"):
        # Inserted as text: parsing and rendering a long body again would take long.
        start = bytes(response.body)[:-1].rstrip()
        comma = "" if start == b"{" else ","
        response.body = start + f"{comma}{member}}}".encode()
        response.headers["content-length"] = str(len(response.body))
    return response


async def _with_events(chunks: Any, member: str) -> AsyncIterator[Any]:
    """A stream of server-sent events with a member added to its first JSON object, and to each whole answer in it."""
    is_added = False
    async for chunk in chunks:
        if isinstance(chunk, str):
            chunk = _ANSWER.sub(lambda start: f"{start[0]}{member},", chunk)
            if not is_added and _FIRST_EVENT.search(chunk):
                chunk = _FIRST_EVENT.sub(lambda start: f"data: {{{member}{'}' if start[1] else ','}", chunk, count=1)
                is_added = True
        yield chunk
