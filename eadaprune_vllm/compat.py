"""vLLM 0.26 and 0.27 behind the seams of 0.32 that this package uses, as far as LLaVA-1.5 needs them.

Nothing in here does anything where vLLM is newer.
"""

from dataclasses import replace
from importlib import import_module
from typing import Any, NamedTuple

import vllm
from fastapi import APIRouter, FastAPI
from packaging.version import Version
from vllm import exceptions
from vllm.multimodal.processing import BaseMultiModalProcessor
from vllm.multimodal.processing.inputs import ProcessorInputs

from eadaprune_vllm.hooks import wrap

OLDER = Version(vllm.__version__) < Version("0.32.0.dev0")
VLLMServerError: Any = getattr(exceptions, "VLLMServerError", RuntimeError)  # 0.26 has none
# Where 0.32 has a module: where older ones have it.
_MOVED = {
    "vllm.entrypoints.launchers.run_batch": "vllm.entrypoints.openai.run_batch",
    "vllm.entrypoints.serve.engine.protocol": "vllm.entrypoints.openai.engine.protocol",
    "vllm.renderers.chat_utils": "vllm.entrypoints.chat_utils",
}


def module(name: str) -> Any:
    """A module of vLLM, by its name in 0.32."""
    return import_module(_MOVED[name] if OLDER else name)


def hasher(info: Any) -> tuple[Any, ...]:
    """What vLLM's functions that hash take first: in 0.26 nothing."""
    config = info.ctx.get_mm_config()
    return (config.mm_hasher_algorithm,) if hasattr(config, "mm_hasher_algorithm") or not OLDER else ()


def processor_device(mm_config: Any) -> str:
    """The kind of device that images are processed on."""
    kwargs = mm_config.mm_processor_kwargs or {}
    return str((kwargs.get("device") if OLDER else mm_config.get_mm_processor_device_type()) or "cpu")


def processors(renderer: Any) -> list[Any]:
    """All of a renderer's processors: older ones have a second, for requests that must leave the cache as it is."""
    both = renderer.mm_processor, getattr(renderer, "_readonly_mm_processor", None)
    return [processor for processor in both if processor]


def replace_routes(app: FastAPI, router: APIRouter) -> None:
    """Serve the routes of ``router`` in the place of the app's own. Older ones serve whichever was there first."""
    own = len(app.routes)
    app.include_router(router)
    if OLDER:
        added: list[Any] = app.routes[own:]
        taken = [(route.path, route.methods) for route in added]
        others = [r for r in app.routes[:own] if (getattr(r, "path", ""), getattr(r, "methods", None)) not in taken]
        app.router.routes[:] = added + others


def install() -> None:
    """Have the processor make its dummy inputs itself: older ones have it process blank images, which takes a tower."""
    if not OLDER:
        return
    from vllm.multimodal.registry import MultiModalRegistry
    from vllm.renderers.base import BaseRenderer

    @wrap(MultiModalRegistry, "get_dummy_mm_inputs")
    def get_dummy_mm_inputs(_: Any, registry: Any, model: Any, mm_counts: Any, processor: Any = None, **__: Any) -> Any:
        return (processor or registry.create_processor(model)).get_dummy_mm_inputs(mm_counts)

    @wrap(BaseRenderer, "_warmup_mm_processor")
    def warmup_mm_processor(*_: Any, **__: Any) -> None: ...  # ours has its own


class _Hashes(dict[str, Any]):
    """The hashes of a request's items, and the request."""

    def __init__(self, hashes: Any, inputs: ProcessorInputs) -> None:
        super().__init__(hashes)
        self.inputs = inputs


class _Result(NamedTuple):
    """What older ones unpack."""

    prompt_ids: list[int]
    info: Any
    is_update_applied: bool

    @property
    def prompt_updates(self) -> Any:
        return self.info.prompt_updates


class OlderProcessor(BaseMultiModalProcessor):
    """An older processor that calls its subclasses, and is called by them, as that of 0.32."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "_apply_hf_processor_main" in vars(cls):

            @wrap(cls, "_apply_hf_processor_main")
            def main(original: Any, self: Any, **given: Any) -> tuple[Any, Any, bool]:
                return given["prompt"], original(self, given["mm_items"], given["hf_processor_mm_kwargs"]), False

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Any) -> Any:
        return self._apply_hf_processor_mm_only(mm_items, hf_kwargs, tokenization_kwargs={})

    def _get_mm_hashes(self, inputs: ProcessorInputs) -> Any:
        return inputs.get_mm_hashes(self.info.model_id, *hasher(self.info))

    def _get_cache_missing_processor_kwargs(self, inputs: ProcessorInputs, mm_is_cached: Any) -> Any:
        return inputs.hf_processor_mm_kwargs

    def _cached_apply_hf_processor(self, inputs: ProcessorInputs, *args: Any) -> _Result:
        inputs = replace(inputs)  # it changes below
        inputs.get_mm_hashes = lambda *_: _Hashes(self._get_mm_hashes(inputs), inputs)
        return _Result(*super()._cached_apply_hf_processor(inputs, *args))

    def _get_cache_missing_items(self, cache: Any, mm_data_items: Any, mm_hashes: Any) -> Any:
        mm_is_cached, missing = super()._get_cache_missing_items(cache, mm_data_items, mm_hashes)
        inputs = mm_hashes.inputs
        inputs.hf_processor_mm_kwargs = self._get_cache_missing_processor_kwargs(inputs, mm_is_cached)
        return mm_is_cached, missing


Processor: Any = OlderProcessor if OLDER else BaseMultiModalProcessor
