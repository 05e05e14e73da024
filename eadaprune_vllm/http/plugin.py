"""Entry point ``vllm.endpoint_plugins``: our endpoints and routes in vLLM's HTTP server."""

from argparse import Namespace
from copy import copy
from typing import Any

import vllm
from fastapi import APIRouter, FastAPI, Request
from fastapi.routing import APIRoute
from starlette.datastructures import State

from eadaprune_vllm import __version__
from eadaprune_vllm.core.options import SELECTOR_NAMES
from eadaprune_vllm.core.server_info import Config, Reference
from eadaprune_vllm.frontend.load import watch_load
from eadaprune_vllm.http import page, preview
from eadaprune_vllm.http.route import PruningRoute, openapi_extra, takes_options
from eadaprune_vllm.startup.naming import NAME

router = APIRouter(prefix="/v1/eadaprune", tags=["EAdaPrune"])


class EndpointPlugin:
    """vLLM's protocol of this name."""

    name = NAME
    required_tasks = None

    def attach_router(self, app: FastAPI) -> None:
        """Replace every route with a JSON body by a ``PruningRoute``, and add our own routes."""
        replacements = APIRouter()
        for route in app.routes:
            if isinstance(route, APIRoute) and (route.body_field or takes_options(route)):
                replacement = copy(route)
                replacement.__class__ = PruningRoute  # FastAPI makes the included route of the same class
                replacement.openapi_extra = openapi_extra(route)
                replacements.routes.append(replacement)
        app.include_router(replacements)
        app.include_router(router)
        app.include_router(preview.router)
        app.include_router(page.router)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Put the processor where endpoints find it, and start to follow the load if thresholds do."""
        state.eadaprune_renderer = engine_client.renderer
        state.eadaprune = engine_client.renderer.mm_processor
        if state.eadaprune.server_options.load_aware:
            watch_load(engine_client, state.eadaprune.front_end.observe_load, state.eadaprune.front_end.show_load)


@router.get("/config")
async def config(request: Request) -> Config:
    """The server's pruning options, and which endpoints take them."""
    state = request.app.state
    model, options = state.eadaprune_renderer.model_config, state.eadaprune.server_options
    return Config(
        version=__version__,
        vllm_version=vllm.__version__,
        models=[path.name for path in state.openai_serving_models.base_model_paths],
        architecture=model.architecture,
        dtype=str(model.dtype).removeprefix("torch."),
        configured=options,
        effective=options.resolve(),
        reference=Reference.of(options),
        selectors=list(SELECTOR_NAMES),
        endpoints=[
            route.path
            for route in request.app.routes
            if isinstance(route, PruningRoute) and takes_options(route) and route.include_in_schema
        ],
    )
