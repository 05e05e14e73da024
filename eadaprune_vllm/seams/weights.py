"""Weight updates: rows that old weights made are forgotten with them."""

from typing import Any

from eadaprune_vllm.seams.processes import front_ends
from eadaprune_vllm.seams.wrap import wrap

# Calls of vLLM's workers after which the model's weights are others.
_CHANGE_WEIGHTS = ("finish_weight_update", "reload_weights", "reset_weights", "update_weights")


def install() -> None:
    @wrap("vllm.v1.engine.async_llm:AsyncLLM.collective_rpc")
    async def collective_rpc_async(original: Any, llm: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        if method in _CHANGE_WEIGHTS and front_ends(llm.vllm_config) > 1:
            raise NotImplementedError(f"{method} with several API servers: the others remember what old weights made")
        result = await original(llm, method, *args, **kwargs)
        if method in _CHANGE_WEIGHTS:
            llm.renderer.mm_processor.front_end.forget()
            await llm.reset_mm_cache()
            await llm.reset_encoder_cache()
        return result

    @wrap("vllm.v1.engine.llm_engine:LLMEngine.collective_rpc")
    def collective_rpc(original: Any, llm: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(llm, method, *args, **kwargs)
        if method in _CHANGE_WEIGHTS:
            llm.renderer.mm_processor.front_end.forget()
            llm.reset_mm_cache()
            llm.reset_encoder_cache()
        return result
