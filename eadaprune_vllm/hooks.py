"""Every private name of vLLM that this package touches, tested with the versions in ``startup.TESTED``.

Each hook wraps one function and calls the original. Installing twice is harmless.
"""

import functools
from collections.abc import Callable
from typing import Any

from eadaprune_vllm.flags import add_flags, apply_flags
from eadaprune_vllm.options import KEY

_MARK = "_eadaprune_wrapped"


def wrap(
    owner: Any, name: str, kind: Callable[[Any], Any] = lambda function: function
) -> Callable[[Callable[..., Any]], None]:
    """Decorator: replace ``owner.name`` by a function that is called with the original before its own arguments.

    Does nothing if it was wrapped before. ``kind`` is ``staticmethod`` or ``classmethod`` where the original is one.

    Raises:
        AttributeError: if there is no such name, which is better than a wrapper that nobody calls.
    """

    def decorate(wrapper: Callable[..., Any]) -> None:
        original = getattr(owner, name)
        original = getattr(original, "__func__", original)
        if hasattr(original, _MARK):
            return

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return wrapper(original, *args, **kwargs)

        setattr(wrapped, _MARK, True)
        setattr(owner, name, kind(wrapped))

    return decorate


def install_flags() -> None:
    """Add ``--plugin`` and ``--eadaprune-*`` to whatever parser vLLM builds from its engine arguments."""
    from vllm.engine.arg_utils import EngineArgs

    @wrap(EngineArgs, "add_cli_args", staticmethod)
    def add_cli_args(original: Any, parser: Any) -> Any:
        parser = original(parser)
        add_flags(parser)
        return parser

    @wrap(EngineArgs, "from_cli_args", classmethod)
    def from_cli_args(original: Any, cls: Any, args: Any) -> Any:
        apply_flags(args)
        return original(cls, args)


def install() -> None:
    """Hook into an active server: its configuration, its front ends, its requests."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.pooling.base import serving as pooling
    from vllm.renderers import online_renderer
    from vllm.renderers.registry import RendererRegistry
    from vllm.v1.engine.input_processor import InputProcessor

    from eadaprune_vllm import startup
    from eadaprune_vllm.models.base import PruningProcessor

    front_ends: list[PruningProcessor] = []

    @wrap(EngineArgs, "create_model_config")
    def create_model_config(original: Any, engine_args: Any) -> Any:
        # vLLM would hand our key to the image processor, so it travels as an attribute of the config instead.
        given = engine_args.mm_processor_kwargs
        engine_args.mm_processor_kwargs = {k: v for k, v in (given or {}).items() if k != KEY} or None
        try:
            model_config = original(engine_args)
        finally:
            engine_args.mm_processor_kwargs = given
        startup.check_model(model_config)
        setattr(model_config.multimodal_config, KEY, startup.server_options((given or {}).get(KEY)))
        return model_config

    @wrap(EngineArgs, "create_engine_config")
    def create_engine_config(original: Any, *args: Any, **kwargs: Any) -> Any:
        startup.check_version()
        vllm_config = original(*args, **kwargs)
        startup.check_flags(vllm_config)
        startup.check_tower(vllm_config)
        return vllm_config

    # Only front ends have a renderer, so the tower is loaded here and nowhere else.
    @wrap(RendererRegistry, "load_renderer")
    def load_renderer(original: Any, registry: Any, mode: str, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        renderer = original(registry, mode, vllm_config, *args, **kwargs)
        renderer.mm_processor.front_end = startup.front_end(vllm_config)
        front_ends[:] = [renderer.mm_processor]
        return renderer

    # A request counts once it has passed vLLM's own checks and enters the engine.
    @wrap(InputProcessor, "process_inputs")
    def process_inputs(
        original: Any, input_processor: Any, request_id: str, prompt: Any, *args: Any, **kwargs: Any
    ) -> Any:
        request = original(input_processor, request_id, prompt, *args, **kwargs)
        if isinstance(prompt, dict) and prompt.get(KEY):
            input_processor.renderer.mm_processor.front_end.admit(prompt[KEY])
        return request

    # vLLM refuses options of the image processor from clients it was not told to trust. Ours are checked, so they
    # may pass; it judges the rest.
    for module in (online_renderer, pooling):

        @wrap(module, "validate_request_mm_kwargs")
        def validate_request_mm_kwargs(original: Any, *, mm_processor_kwargs: Any, **kwargs: Any) -> None:
            given = dict(mm_processor_kwargs or {})
            override = given.pop(KEY, None)
            original(mm_processor_kwargs=given, **kwargs)
            for processor in front_ends:
                processor.resolve(override)
