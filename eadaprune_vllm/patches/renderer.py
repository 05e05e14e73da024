"""Rendering: where vLLM makes engine inputs of requests, the options of their images and videos are resolved, and the
engine is asked before vLLM processes them, so that nothing waits on its one thread."""

import asyncio
from typing import Any

from vllm.utils.async_utils import make_async
from vllm.utils.torch_utils import set_default_torch_num_threads

from eadaprune_vllm.compat import drain_invalidations
from eadaprune_vllm.core.options import KEY
from eadaprune_vllm.errors import StartupError
from eadaprune_vllm.frontend.pending import PendingItem
from eadaprune_vllm.frontend.processor import Steps
from eadaprune_vllm.frontend.rendering import chat_extras, refuse_options, rendered
from eadaprune_vllm.patching import wrap


def install() -> None:
    # All that is chat-like is rendered by one of these two: every such endpoint, and LLM.chat.
    def render_each(
        original: Any, renderer: Any, conversations: Any, *args: Any, prompt_extras: Any = None, **kwargs: Any
    ) -> list[Any]:
        """One call per conversation: the options are those of its own images."""
        extras = [chat_extras(renderer, conversation, prompt_extras) for conversation in conversations]
        return [
            original(renderer, [conversation], *args, prompt_extras=own, **kwargs)
            for conversation, own in zip(conversations, extras, strict=True)
        ]

    @wrap("vllm.renderers.base:BaseRenderer.render_chat_async")
    async def render_chat_async(
        original: Any, renderer: Any, conversations: Any, *args: Any, prompt_extras: Any = None, **kwargs: Any
    ) -> Any:
        each = render_each(original, renderer, conversations, *args, prompt_extras=prompt_extras, **kwargs)
        return rendered(renderer, await asyncio.gather(*each))

    @wrap("vllm.renderers.base:BaseRenderer.render_chat")
    def render_chat(
        original: Any, renderer: Any, conversations: Any, *args: Any, prompt_extras: Any = None, **kwargs: Any
    ) -> Any:
        each = render_each(original, renderer, conversations, *args, prompt_extras=prompt_extras, **kwargs)
        return rendered(renderer, each)

    # And the rest by these, which take no images or videos over HTTP.
    for name in ("render_cmpl", "render_cmpl_async"):

        @wrap(f"vllm.renderers.base:BaseRenderer.{name}")
        def render_cmpl(
            original: Any, renderer: Any, prompts: Any, *args: Any, prompt_extras: Any = None, **kwargs: Any
        ) -> Any:
            refuse_options(renderer, prompts, prompt_extras)
            return original(renderer, prompts, *args, prompt_extras=prompt_extras, **kwargs)

    # vLLM refuses options of the image processor from clients it was not told to trust. Ours are checked where they
    # are resolved, so they may pass; it judges the rest.
    for module in ("vllm.renderers.online_renderer", "vllm.entrypoints.pooling.base.serving"):

        @wrap(f"{module}:validate_request_mm_kwargs")
        def validate_request_mm_kwargs(original: Any, *, mm_processor_kwargs: Any, **kwargs: Any) -> None:
            others = {key: value for key, value in (mm_processor_kwargs or {}).items() if key != KEY}
            original(mm_processor_kwargs=others, **kwargs)


def decide_between(renderer: Any) -> None:
    """Have a renderer of vLLM's run the processor's steps, and the engine decide between them.

    Raises:
        StartupError: if it renders in another way.
    """
    front_end = renderer.mm_processor.front_end
    try:
        process, process_async = renderer._process_multimodal, renderer._process_multimodal_async
    except AttributeError as error:
        raise StartupError(f"this vLLM's renderer is not of the kind known: {error}") from None

    def advance(steps: Steps) -> tuple[list[PendingItem] | None, Any]:
        """What is undecided after the next step, or vLLM's input. As vLLM does around processing."""
        drain_invalidations(renderer)
        with set_default_torch_num_threads():
            try:
                return next(steps), None
            except StopIteration as last:
                renderer.update_mm_cache_stats()
                return None, last.value

    def process_sync(*args: Any, mm_processor_kwargs: Any, **kwargs: Any) -> Any:
        steps = process(*args, mm_processor_kwargs=_as_request(mm_processor_kwargs), **kwargs)
        while True:
            undecided, result = advance(steps)
            if undecided is None:
                return result
            front_end.decide_sync(undecided)

    async def process_in_turn(*args: Any, mm_processor_kwargs: Any, **kwargs: Any) -> Any:
        steps = await process_async(*args, mm_processor_kwargs=_as_request(mm_processor_kwargs), **kwargs)
        while True:
            undecided, result = await advance_async(steps)
            if undecided is None:
                return result
            await front_end.decide(undecided)

    advance_async = make_async(advance, executor=renderer._mm_executor)
    renderer._process_multimodal, renderer._process_multimodal_async = process_sync, process_in_turn


def _as_request(mm_processor_kwargs: Any) -> dict[str, Any]:
    """The processor's options of a request, with ours, without which it is warm-up to the processor."""
    given = dict(mm_processor_kwargs or {})
    return given | {KEY: {} if given.get(KEY) is None else given[KEY]}
