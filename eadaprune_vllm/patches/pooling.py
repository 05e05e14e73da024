"""Pooling servers: vLLM renders each prompt on the tokenizer's only thread, which a pending decision would block."""

import functools
from contextvars import copy_context
from copy import copy
from types import SimpleNamespace
from typing import Any

from eadaprune_vllm.frontend.context import current
from eadaprune_vllm.frontend.rendering import collect_reports
from eadaprune_vllm.patching import wrap


def install() -> None:
    @wrap("vllm.entrypoints.pooling.base.io_processor:make_async")
    def make_async(original: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
        """vLLM makes ``PoolingIOProcessor.render`` asynchronous with this function."""
        processor = func.__self__

        def on_thread(render: Any) -> Any:  # with the request's context
            return original(functools.partial(copy_context().run, render), *args, **kwargs)

        async def render_async(params: Any) -> Any:
            def select(*names: str) -> dict[str, Any]:
                return {name: params[name] for name in names}

            if "late_chunking" in params:  # for texts only
                return await on_thread(func)(params)
            common = select("tok_params", "prompt_extras", "skip_mm_cache")
            if "data_1" in params:  # a pair, which becomes one prompt
                result = await on_thread(_compose)(processor, params)
                prompt = await processor.renderer.process_for_engine_async(*result["prompts"])
                return result | {"prompts": prompt}
            if "conversations" in params:
                chats = [params["conversations"]]
                _, (prompt,) = await processor.renderer.render_chat_async(chats, **select("chat_params"), **common)
            elif isinstance(params["prompts"], dict) and params["prompts"].get("multi_modal_data"):
                (prompt,) = await processor.renderer.render_cmpl_async([params["prompts"]], **common)
            else:
                return await on_thread(func)(params)
            return {"prompts": prompt, **select("params", "lora_requests", "priorities")}

        return render_async

    # The prompts of a request are rendered concurrently; the report lists them in the request's order.
    @wrap("vllm.entrypoints.pooling.base.serving:PoolingBaseServing._preprocessing")
    async def preprocessing(original: Any, serving: Any, io_processor: Any, ctx: Any) -> None:
        await original(serving, io_processor, ctx)
        current().prunings.clear()
        collect_reports(serving.renderer, [each["prompts"] for each in ctx.engine_inputs])


def _compose(processor: Any, params: Any) -> Any:
    """``render`` of a cross-encoder without the last step: the prompt of a pair, not processed for the engine yet."""
    composing = copy(processor)
    composing.renderer = SimpleNamespace(process_for_engine=lambda prompt, arrival_time: (prompt, arrival_time))
    return composing.render(params)
