"""Every private name of vLLM that this package touches, tested with the versions in ``TESTED``; ``compat`` has what
older ones name otherwise.

Each hook wraps one function and calls the original. Installing twice is harmless.
"""

import asyncio
import functools
import os
import sys
from collections.abc import Callable
from contextvars import copy_context
from typing import Any

from packaging.specifiers import SpecifierSet

from eadaprune_vllm.errors import StartupError
from eadaprune_vllm.flags import add_flags, apply_flags
from eadaprune_vllm.options import KEY

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
    owner: Any, name: str, kind: Callable[[Any], Any] = lambda function: function, optional: bool = False
) -> Callable[[Callable[..., Any]], None]:
    """Decorator: replace ``owner.name`` by a function that is called with the original before its own arguments.

    Does nothing if it was wrapped before. ``kind`` is ``staticmethod`` or ``classmethod`` where the original is one.

    Raises:
        AttributeError: if there is no such name, which is better than a wrapper that nobody calls, unless ``optional``.
    """

    def decorate(wrapper: Callable[..., Any]) -> None:
        if optional and not hasattr(owner, name):
            return
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
    from eadaprune_vllm import compat

    compat.install()
    _install_configuration()
    _install_requests()
    _install_anthropic()


def _install_configuration() -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.renderers.registry import RendererRegistry
    from vllm.usage.usage_lib import UsageContext

    from eadaprune_vllm import compat, startup

    @wrap(EngineArgs, "create_engine_config")
    def create_engine_config(original: Any, engine_args: Any, *args: Any, **kwargs: Any) -> Any:
        # vLLM would hand our key to the image processor, so it travels as an attribute of the config instead.
        given = engine_args.mm_processor_kwargs
        options = startup.server_options((given or {}).get(KEY))
        if options.load_aware:
            usage = kwargs.get("usage_context", args[0] if args else None)
            startup.check_load_aware(serving=usage is UsageContext.OPENAI_API_SERVER, engine_args=engine_args)
        engine_args.mm_processor_kwargs = {k: v for k, v in (given or {}).items() if k != KEY} or None
        try:
            vllm_config = original(engine_args, *args, **kwargs)
        finally:
            engine_args.mm_processor_kwargs = given
        startup.check(vllm_config)
        startup.configure(vllm_config, options, tower=not kwargs.get("headless"))
        return vllm_config

    # Only front ends have a renderer, so the tower is loaded here and nowhere else.
    @wrap(RendererRegistry, "load_renderer")
    def load_renderer(original: Any, registry: Any, mode: str, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        front_end = startup.front_end(vllm_config)
        renderer = original(registry, mode, vllm_config, *args, **kwargs)
        for processor in compat.processors(renderer):
            processor.front_end = front_end
        if front_end.device.type == "cpu":  # it is warmed up where it computes
            renderer.mm_processor.warm_up()
        return renderer


def _install_requests() -> None:
    from vllm.entrypoints.pooling.base import io_processor as pooling_processor
    from vllm.entrypoints.pooling.base import serving as pooling
    from vllm.exceptions import VLLMValidationError
    from vllm.renderers import online_renderer
    from vllm.renderers.base import BaseRenderer
    from vllm.v1.engine.input_processor import InputProcessor

    from eadaprune_vllm import compat
    from eadaprune_vllm import request as requests

    # All that is chat-like is rendered by one of these two: every such door, and LLM.chat.
    def render_each(
        original: Any, renderer: Any, conversations: Any, *args: Any, prompt_extras: Any = None, **kwargs: Any
    ) -> list[Any]:
        """One call per conversation: the options are those of its own images."""
        extras = [requests.chat_extras(renderer, conversation, prompt_extras) for conversation in conversations]
        return [
            original(renderer, [conversation], *args, prompt_extras=own, **kwargs)
            for conversation, own in zip(conversations, extras, strict=True)
        ]

    @wrap(BaseRenderer, "render_chat_async")
    async def render_chat_async(original: Any, renderer: Any, *args: Any, **kwargs: Any) -> Any:
        return requests.rendered(renderer, await asyncio.gather(*render_each(original, renderer, *args, **kwargs)))

    @wrap(BaseRenderer, "render_chat")
    def render_chat(original: Any, renderer: Any, *args: Any, **kwargs: Any) -> Any:
        return requests.rendered(renderer, render_each(original, renderer, *args, **kwargs))

    # And the rest by these, which take no images or videos over HTTP.
    for name in ("render_cmpl", "render_cmpl_async"):

        @wrap(BaseRenderer, name)
        def render_cmpl(
            original: Any, renderer: Any, prompts: Any, *args: Any, prompt_extras: Any = None, **kwargs: Any
        ) -> Any:
            requests.refuse_options(renderer, prompts, prompt_extras)
            return original(renderer, prompts, *args, prompt_extras=prompt_extras, **kwargs)

    # Pooling renders on a thread, which must find the request's context. (In 0.26 it is the other module's.)
    @wrap(pooling_processor if hasattr(pooling_processor, "make_async") else pooling, "make_async")
    def make_async(original: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        return lambda *a, **k: original(functools.partial(copy_context().run, function), *args, **kwargs)(*a, **k)

    # These requests come from a file, past all HTTP routes; what the function raises becomes the line's error.
    @wrap(compat.module("vllm.entrypoints.launchers.run_batch"), "run_request")
    async def run_request(original: Any, function: Any, request: Any, *args: Any) -> Any:
        async def refuse(_: Any) -> None:
            raise VLLMValidationError(f"{KEY} does nothing at {request.url}", parameter=KEY)

        if request.url not in requests.DOORS and any(requests.mentions(request.body.model_dump())):
            function = refuse
        context = requests.RequestContext(options=(request.body.model_extra or {}).get(KEY))
        with requests.request_context(context):
            output = await original(function, request, *args)
        if (report := context.report()) and output.response.body:
            setattr(output.response.body, KEY, report)
        return output

    # A request counts once it has passed vLLM's own checks and enters the engine.
    @wrap(InputProcessor, "process_inputs")
    def process_inputs(
        original: Any, input_processor: Any, request_id: str, prompt: Any, *args: Any, **kwargs: Any
    ) -> Any:
        request = original(input_processor, request_id, prompt, *args, **kwargs)
        if isinstance(prompt, dict) and KEY in prompt:
            input_processor.renderer.mm_processor.front_end.admit(prompt[KEY])
            if input_processor.vllm_config.observability_config.otlp_traces_endpoint:
                from eadaprune_vllm.tracing import trace_pruning  # vLLM checks that OpenTelemetry is installed

                request.trace_headers = trace_pruning(request.trace_headers, prompt[KEY])
        return request

    # vLLM refuses options of the image processor from clients it was not told to trust. Ours are checked where they
    # are resolved, so they may pass; it judges the rest.
    for module in (online_renderer, pooling):

        @wrap(module, "validate_request_mm_kwargs", optional=compat.OLDER)
        def validate_request_mm_kwargs(original: Any, *, mm_processor_kwargs: Any, **kwargs: Any) -> None:
            others = {key: value for key, value in (mm_processor_kwargs or {}).items() if key != KEY}
            original(mm_processor_kwargs=others, **kwargs)


def _install_anthropic() -> None:
    """Let options on the images of ``/v1/messages`` through: vLLM's models of that API drop what they do not know."""
    from vllm.entrypoints.anthropic import protocol
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
    from vllm.exceptions import VLLMValidationError

    from eadaprune_vllm import compat
    from eadaprune_vllm import request as requests

    protocol.AnthropicContentBlock.model_config["extra"] = "allow"
    for name in ("ContentBlock", "Message", "MessagesRequest", "CountTokensRequest"):
        getattr(protocol, f"Anthropic{name}").model_rebuild(force=True)

    @wrap(AnthropicServingMessages, "_convert_block", classmethod)
    def convert_block(
        original: Any, cls: Any, block: Any, role: str, parts: Any, calls: Any, reasoning: Any, messages: Any
    ) -> None:
        before = len(parts), len(messages)
        original(cls, block, role, parts, calls, reasoning, messages)
        # A block is one part of this message; the images in a tool's result become a message of their own.
        blocks = block.content if isinstance(block.content, list) else []
        sources = (
            [block.model_extra or {}] if block.type == "image" else [b for b in blocks if b.get("type") == "image"]
        )
        if not any(KEY in source for source in sources):
            return
        added = [*parts[before[0] :], *(part for message in messages[before[1] :] for part in message["content"])]
        images = [part for part in added if isinstance(part, dict) and part["type"] == "image_url"]
        if len(images) != len(sources):
            raise VLLMValidationError(f"{KEY} on an image without data", parameter=KEY)
        for image, source in zip(images, sources, strict=True):
            if KEY in source:
                image[KEY] = source[KEY]

    # This renders other texts than the client's while serving it, and remembers whether that went well.
    @wrap(AnthropicServingMessages, "_render_probe_prompt", optional=compat.OLDER)
    async def render_probe_prompt(original: Any, serving: Any, effort: Any) -> Any:
        with requests.request_context(requests.RequestContext()):
            return await original(serving, effort)


def watch_load(engine_client: Any, observe: Callable[[int, float, int], None], show: Callable[[], None]) -> None:
    """Have ``observe`` called after each step of an engine, with its number among this server's, the share of its KV
    cache in use, and how many requests wait; of several front ends each step reaches one. And ``show`` from time to
    time, also when there are no steps."""
    from vllm.v1.metrics.loggers import AggregateStatLoggerBase

    first = engine_client.engine_core.engine_ranks_managed[0]

    class LoadLogger(AggregateStatLoggerBase):
        def __init__(self) -> None: ...

        def log_engine_initialized(self) -> None: ...

        def log(self) -> None:
            show()

        def record(self, scheduler_stats: Any, *_: Any, engine_idx: int = 0, **__: Any) -> None:
            if scheduler_stats:
                observe(engine_idx - first, scheduler_stats.kv_cache_usage, scheduler_stats.num_waiting_reqs)

    engine_client.logger_manager.stat_loggers.append(LoadLogger())


def front_ends(vllm_config: Any) -> int:
    """How many front ends this server has, on this node."""
    return int(vllm_config.parallel_config._api_process_count)


def speaks_for_server(vllm_config: Any) -> bool:
    """Whether this process is the one that should say what concerns all front ends."""
    return front_ends(vllm_config) == 1 or vllm_config.parallel_config._api_process_rank < 0


async def on_render_thread(renderer: Any, function: Callable[..., Any], *args: Any) -> Any:
    """Run ``function`` where vLLM processes images: on the one thread that may set torch's number of threads."""
    return await asyncio.get_running_loop().run_in_executor(renderer._mm_executor, function, *args)
