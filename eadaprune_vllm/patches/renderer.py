"""vLLM's renderer: the options of images and videos are resolved, and the engine decides about them between the
processor's steps, without blocking the renderer's thread."""

import asyncio
from typing import Any

from vllm.utils.async_utils import make_async
from vllm.utils.torch_utils import set_default_torch_num_threads

from eadaprune_vllm.compat import drain_invalidations
from eadaprune_vllm.core.options import KEY
from eadaprune_vllm.errors import StartupError
from eadaprune_vllm.frontend.context import current
from eadaprune_vllm.frontend.pending import PendingItem
from eadaprune_vllm.frontend.processor import Steps
from eadaprune_vllm.frontend.rendering import chat_extras, joined, refuse_options
from eadaprune_vllm.frontend.transfer import TRANSFER, Transfer
from eadaprune_vllm.patching import wrap


def install() -> None:
    # All chat-like endpoints, and LLM.chat, render with one of these two.
    def render_each(
        original: Any, renderer: Any, conversations: Any, *args: Any, prompt_extras: Any = None, **kwargs: Any
    ) -> list[Any]:
        """Render each conversation by itself, with the options of its images."""
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
        return joined(renderer, await asyncio.gather(*each))

    @wrap("vllm.renderers.base:BaseRenderer.render_chat")
    def render_chat(
        original: Any, renderer: Any, conversations: Any, *args: Any, prompt_extras: Any = None, **kwargs: Any
    ) -> Any:
        each = render_each(original, renderer, conversations, *args, prompt_extras=prompt_extras, **kwargs)
        return joined(renderer, each)

    # All others render with these two, which take no images or videos over HTTP.
    for name in ("render_cmpl", "render_cmpl_async"):

        @wrap(f"vllm.renderers.base:BaseRenderer.{name}")
        def render_cmpl(
            original: Any, renderer: Any, prompts: Any, *args: Any, prompt_extras: Any = None, **kwargs: Any
        ) -> Any:
            refuse_options(renderer, prompts, prompt_extras)
            return original(renderer, prompts, *args, prompt_extras=prompt_extras, **kwargs)

    # vLLM rejects mm_processor_kwargs of requests without --trust-request-mm-kwargs. Ours are validated where they are
    # resolved, so vLLM validates the others only.
    for module in ("vllm.renderers.online_renderer", "vllm.entrypoints.pooling.base.serving"):

        @wrap(f"{module}:validate_request_mm_kwargs")
        def validate_request_mm_kwargs(original: Any, *, mm_processor_kwargs: Any, **kwargs: Any) -> None:
            others = {key: value for key, value in (mm_processor_kwargs or {}).items() if key != KEY}
            original(mm_processor_kwargs=others, **kwargs)


def decide_between(renderer: Any) -> None:
    """Have a renderer of vLLM's run the steps of ``PruningProcessor``, and the engine decide between them.

    Raises:
        StartupError: if this vLLM's renderer has no such methods.
    """
    front_end = renderer.mm_processor.front_end
    try:
        process, process_async = renderer._process_multimodal, renderer._process_multimodal_async
    except AttributeError as error:
        raise StartupError(f"this vLLM's renderer is not of the kind known: {error}") from None

    def advance(steps: Steps) -> tuple[list[PendingItem] | None, Any]:
        """Run the next step, with what vLLM does before and after processing.

        Returns:
            The items to decide about, or vLLM's engine input after the last step.
        """
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
                current().rendered = result.get(KEY)
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
    """The processor's options of a request, always with our key: without it the processor takes it for warm-up."""
    given = dict(mm_processor_kwargs or {})
    given |= {KEY: {} if given.get(KEY) is None else given[KEY]}
    transfer = Transfer.of(current().transfer_params)
    return given if transfer is None else given | {TRANSFER: transfer}
