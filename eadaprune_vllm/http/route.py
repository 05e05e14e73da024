"""What HTTP adds to vLLM's own routes: the field and the header in, the report and its headers out.

The routes are vLLM's, with their bodies, checks and handlers; only their class is another.
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
from eadaprune_vllm.frontend.request_options import HEADER, option_fields, reject_misplaced
from eadaprune_vllm.http.endpoints import ENDPOINTS, Endpoint

VISUAL_TOKENS = "X-EAdaPrune-Visual-Tokens"
KEPT_TOKENS = "X-EAdaPrune-Kept-Tokens"
_KWARGS = "mm_processor_kwargs"
# Most bodies do not even hold the word, and may be long. JSON may write its letters as escapes, or in UTF-16.
_WORD = re.compile(KEY.encode() + rb"|\\u00|\x00")
_FIRST_EVENT = re.compile(r"^data: \{(\s*\})?", re.MULTILINE)


class PruningRoute(APIRoute):
    """One of vLLM's routes.

    Modifications:
    - the field ``eadaprune`` and the header ``X-EAdaPrune-Energy`` reach the place where options are resolved
    - a route that takes no options refuses the field
    - the report goes into body and headers
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
            options = body.pop(KEY, None) if isinstance(body, dict) else None  # vLLM's models may forbid it
            with request_context(RequestContext(request.headers.get(HEADER), options)) as context:
                response = await handler(request)
            if isinstance(response, StreamingResponse):  # which may render more turns, after calls of built-in tools
                response.body_iterator = in_context(aiter(response.body_iterator), context)
            return _reported(response, context.report(), in_body=endpoint.reports)

        return handle

    def _check(self, body: Any, endpoint: Endpoint | None) -> None:
        """Raises:
        InvalidOptionsError: if the field is somewhere in the body where it would be ignored.
        """
        fields = endpoint.fields if endpoint else ()
        if isinstance(body, dict) and not body.keys().isdisjoint(fields):
            reject_misplaced([body.get(field) for field in fields])
            if any(option_fields(body.get(_KWARGS))) and not _has_fields(self, (_KWARGS,)):
                raise InvalidOptionsError(f"{KEY} does nothing in {_KWARGS} at {self.path}", KEY)
            return
        if isinstance(body, dict) and self.path.endswith("/derender"):
            body = body | {"chat_request": None}  # is the request as it was rendered, and the field did something then
        if any(option_fields(body)):
            raise InvalidOptionsError(f"{KEY} does nothing at {self.path}: this request takes no images or videos", KEY)


def takes_options(route: APIRoute) -> bool:
    """Whether a route takes images and videos. Under some pooling tasks one of their paths takes text only."""
    return route.path in ENDPOINTS and _has_fields(route, ENDPOINTS[route.path].fields)


def _has_fields(route: APIRoute, fields: Iterable[str]) -> bool:
    """Whether all of these are fields of the route's bodies, or may be, as nothing is said about them."""
    if not route.body_field:
        return True
    models = list(_models(route.body_field.field_info.annotation))
    return all(any(field in model.model_fields for model in models) for field in fields)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that a type is made of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def documented(route: APIRoute) -> dict[str, Any]:
    """The ``openapi_extra`` of one of vLLM's routes: what vLLM says there, and what is ours if it takes options."""
    extra = deepcopy(route.openapi_extra or {})
    if takes_options(route):
        deep_dict_update(extra, _openapi_extra(ENDPOINTS[route.path].reports))
    return extra


def _openapi_extra(reports: bool) -> dict[str, Any]:
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
    """The model's schema without references, which would not resolve where it is put."""
    schema = model.model_json_schema()
    (item,) = schema.pop("$defs").values()
    for items in ("images", "videos"):
        schema["properties"][items]["items"] = item
    return schema


async def _json(request: Request) -> Any:
    """The request's body, parsed once for this route and for FastAPI; None if it is no JSON."""
    if "json" not in request.headers.get("content-type", "").lower():
        return None
    try:
        return await request.json()
    except (ValueError, RecursionError, ClientDisconnect):
        return None  # FastAPI says what is wrong with it


def _reported(response: Response, report: Report | None, in_body: bool) -> Response:
    """The response with the report of its request, if there is one."""
    if not report or response.status_code != 200:
        return response
    response.headers[VISUAL_TOKENS] = str(report.visual_tokens)
    response.headers[KEPT_TOKENS] = str(report.kept_tokens)
    if not in_body:
        return response
    member = f'"{KEY}":{report.model_dump_json()}'
    if isinstance(response, StreamingResponse):
        response.body_iterator = _with_first_event(response.body_iterator, member)
    elif response.media_type == "application/json" and bytes(response.body).endswith(b"}"):
        # Neither parsed nor rendered again: it may be long.
        start = bytes(response.body)[:-1].rstrip()
        comma = "" if start == b"{" else ","
        response.body = start + f"{comma}{member}}}".encode()
        response.headers["content-length"] = str(len(response.body))
    return response


async def _with_first_event(chunks: Any, member: str) -> AsyncIterator[Any]:
    """A stream of server-sent events whose first JSON object has one more member."""
    waiting = True
    async for chunk in chunks:
        if waiting and isinstance(chunk, str) and _FIRST_EVENT.search(chunk):
            chunk = _FIRST_EVENT.sub(lambda start: f"data: {{{member}{'}' if start[1] else ','}", chunk, count=1)
            waiting = False
        yield chunk
