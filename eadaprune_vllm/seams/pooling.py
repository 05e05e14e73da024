"""Embedding servers: vLLM renders a conversation on the thread that tokenizes, where all would wait while one asks."""

import functools
from contextvars import copy_context
from typing import Any

from eadaprune_vllm.seams.wrap import wrap


def install() -> None:
    @wrap("vllm.entrypoints.pooling.base.io_processor:make_async")
    def make_async(original: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Of ``PoolingIOProcessor.render``, which makes one input of the engine's."""

        def of(params: Any, *names: str) -> dict[str, Any]:
            return {name: params[name] for name in names}

        async def render_async(params: Any) -> Any:
            if "conversations" not in params:  # the thread must find the request's context
                return await original(functools.partial(copy_context().run, func), *args, **kwargs)(params)
            _, (prompt,) = await func.__self__.renderer.render_chat_async(
                conversations=[params["conversations"]],
                **of(params, "chat_params", "tok_params", "prompt_extras", "skip_mm_cache"),
            )
            return {"prompts": prompt, **of(params, "params", "lora_requests", "priorities")}

        return render_async
