"""Pooling servers: vLLM renders each prompt on the thread that tokenizes, where all would wait while one asks."""

import functools
from contextvars import copy_context
from copy import copy
from types import SimpleNamespace
from typing import Any

from eadaprune_vllm.frontend.context import current
from eadaprune_vllm.frontend.rendering import note
from eadaprune_vllm.patching import wrap


def install() -> None:
    @wrap("vllm.entrypoints.pooling.base.io_processor:make_async")
    def make_async(original: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Of ``PoolingIOProcessor.render``, which makes one input of the engine's."""
        processor = func.__self__

        def on_thread(render: Any) -> Any:  # which must find the request's context
            return original(functools.partial(copy_context().run, render), *args, **kwargs)

        async def render_async(params: Any) -> Any:
            def of(*names: str) -> dict[str, Any]:
                return {name: params[name] for name in names}

            if "late_chunking" in params:  # of texts only
                return await on_thread(func)(params)
            common = of("tok_params", "prompt_extras", "skip_mm_cache")
            if "data_1" in params:  # the two texts and all images of a pair become one prompt
                result = await on_thread(_composed)(processor, params)
                prompt = await processor.renderer.process_for_engine_async(*result["prompts"])
                return result | {"prompts": prompt}
            if "conversations" in params:
                chats = [params["conversations"]]
                _, (prompt,) = await processor.renderer.render_chat_async(chats, **of("chat_params"), **common)
            elif isinstance(params["prompts"], dict) and params["prompts"].get("multi_modal_data"):
                (prompt,) = await processor.renderer.render_cmpl_async([params["prompts"]], **common)
            else:
                return await on_thread(func)(params)
            return {"prompts": prompt, **of("params", "lora_requests", "priorities")}

        return render_async

    # Prompts of a request are rendered side by side; the report has them in its order.
    @wrap("vllm.entrypoints.pooling.base.serving:PoolingBaseServing._preprocessing")
    async def preprocessing(original: Any, serving: Any, io_processor: Any, ctx: Any) -> None:
        await original(serving, io_processor, ctx)
        current().prunings.clear()
        note(serving.renderer, [each["prompts"] for each in ctx.engine_inputs])


def _composed(processor: Any, params: Any) -> Any:
    """What the ``render`` of a cross-encoder makes of a pair, before anything is processed for the engine."""
    composing = copy(processor)
    composing.renderer = SimpleNamespace(process_for_engine=lambda prompt, arrival_time: (prompt, arrival_time))
    return composing.render(params)
