"""Entry point ``vllm.endpoint_plugins``: what the plugin adds to vLLM's HTTP API."""

from argparse import Namespace
from copy import copy
from typing import Any

import vllm
from fastapi import APIRouter, FastAPI, Request
from fastapi.routing import APIRoute
from starlette.datastructures import State

from eadaprune_vllm import __version__
from eadaprune_vllm.core.options import SELECTOR_NAMES
from eadaprune_vllm.core.report import Config, Reference
from eadaprune_vllm.frontend.load import watch_load
from eadaprune_vllm.http import page, preview
from eadaprune_vllm.http.route import PruningRoute, documented, takes_options
from eadaprune_vllm.startup.naming import NAME

router = APIRouter(prefix="/v1/eadaprune", tags=["EAdaPrune"])


class EndpointPlugin:
    """vLLM's contract of that name: what an active server adds to its application."""

    name = NAME
    required_tasks = None

    def attach_router(self, app: FastAPI) -> None:
        """Make a ``PruningRoute`` of every route that takes a JSON body, and add our own."""
        twins = APIRouter()
        for route in app.routes:
            if isinstance(route, APIRoute) and (route.body_field or takes_options(route)):
                twin = copy(route)
                twin.__class__ = PruningRoute  # FastAPI builds the included route of its class
                twin.openapi_extra = documented(route)
                twins.routes.append(twin)
        app.include_router(twins)
        app.include_router(router)
        app.include_router(preview.router)
        app.include_router(page.router)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        state.eadaprune_renderer = engine_client.renderer
        state.eadaprune = engine_client.renderer.mm_processor
        if state.eadaprune.server_options.load_aware:
            watch_load(engine_client, state.eadaprune.front_end.observe_load, state.eadaprune.front_end.show_load)


@router.get("/config")
async def config(request: Request) -> Config:
    """The server's pruning options and what it supports."""
    state = request.app.state
    model = state.eadaprune_renderer.model_config
    return Config(
        version=__version__,
        vllm_version=vllm.__version__,
        models=[path.name for path in state.openai_serving_models.base_model_paths],
        architecture=model.architecture,
        dtype=str(model.dtype).removeprefix("torch."),
        options=state.eadaprune.server_options,
        reference=Reference.of(state.eadaprune.server_options),
        selectors=list(SELECTOR_NAMES),
        endpoints=[
            route.path
            for route in request.app.routes
            if isinstance(route, PruningRoute) and takes_options(route) and route.include_in_schema
        ],
    )
