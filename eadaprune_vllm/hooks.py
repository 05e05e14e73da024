"""Every private name of vLLM that this package touches, tested with the versions in ``TESTED``.

Each hook wraps one function and calls the original. Installing twice is harmless.
"""

import functools
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from packaging.specifiers import SpecifierSet

from eadaprune_vllm.errors import StartupError
from eadaprune_vllm.flags import add_flags, apply_flags
from eadaprune_vllm.options import KEY

if TYPE_CHECKING:
    from eadaprune_vllm.models.base import PruningProcessor

TESTED = SpecifierSet(">=0.32.0,<0.33")
SKIP_VERSION_CHECK = "EADAPRUNE_SKIP_VERSION_CHECK"
_MARK = "_eadaprune_wrapped"


def check_version() -> None:
    """Raises:
    StartupError: if vLLM is not of a tested version and the check was not switched off.
    """
    import vllm

    if not TESTED.contains(vllm.__version__, prereleases=True) and not os.environ.get(SKIP_VERSION_CHECK):
        raise StartupError(
            f"vLLM {vllm.__version__} is not supported; tested is {TESTED} "
            f"(set {SKIP_VERSION_CHECK}=1 to try it all the same)"
        )


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
    """Add ``--plugin`` and ``--eadaprune-*`` to whatever parser vLLM builds from its engine arguments.

    Raises:
        ImportError, AttributeError: if this vLLM has no such seams.
    """
    from vllm.engine.arg_utils import EngineArgs

    @wrap(EngineArgs, "add_cli_args", staticmethod)
    def add_cli_args(original: Any, parser: Any) -> Any:
        parser = original(parser)
        add_flags(parser)
        # `vllm serve` has imported it by now; elsewhere it is not used, and too slow to import.
        if "vllm.entrypoints.launchers.dp_supervisor" in sys.modules:
            _install_supervisor()
        return parser

    @wrap(EngineArgs, "from_cli_args", classmethod)
    def from_cli_args(original: Any, cls: Any, args: Any) -> Any:
        apply_flags(args)
        return original(cls, args)


def _install_supervisor() -> None:
    """The data-parallel supervisor passes the command line on to its children without turning it into engine
    arguments, and the children load no plugin before they do that."""
    from vllm.entrypoints.launchers.dp_supervisor import DPSupervisor

    @wrap(DPSupervisor, "__init__")
    def init(original: Any, supervisor: Any, args: Any) -> None:
        apply_flags(args)
        original(supervisor, args)


def install() -> None:
    """Hook into an active server: its configuration, its front ends, its requests."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.pooling.base import serving as pooling
    from vllm.renderers import online_renderer
    from vllm.renderers.registry import RendererRegistry
    from vllm.v1.engine.input_processor import InputProcessor

    from eadaprune_vllm import startup

    processors: WeakSet[PruningProcessor] = WeakSet()  # this process's, for the requests it checks

    @wrap(EngineArgs, "create_engine_config")
    def create_engine_config(original: Any, engine_args: Any, *args: Any, **kwargs: Any) -> Any:
        # vLLM would hand our key to the image processor, so it travels as an attribute of the config instead.
        given = engine_args.mm_processor_kwargs
        options = startup.server_options((given or {}).get(KEY))
        engine_args.mm_processor_kwargs = {k: v for k, v in (given or {}).items() if k != KEY} or None
        try:
            vllm_config = original(engine_args, *args, **kwargs)
        finally:
            engine_args.mm_processor_kwargs = given
        startup.check(vllm_config)
        setattr(vllm_config.model_config.multimodal_config, KEY, options)
        return vllm_config

    # Only front ends have a renderer, so the tower is loaded here and nowhere else.
    @wrap(RendererRegistry, "load_renderer")
    def load_renderer(original: Any, registry: Any, mode: str, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        front_end = startup.front_end(vllm_config)
        renderer = original(registry, mode, vllm_config, *args, **kwargs)
        renderer.mm_processor.front_end = front_end
        processors.clear()
        processors.add(renderer.mm_processor)
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
            for processor in processors:
                processor.resolve(override)
