"""Weight updates: after any call of the workers that may change weights, embeddings of the old ones are never used.

vLLM's weight version does not help: it is a label that operators set.
"""

from typing import Any

from eadaprune_vllm.patching import wrap

# Methods of vLLM's workers that do not change the model's weights. All others may, such as functions, and methods of an
# operator's worker extension.
_KEEP_WEIGHTS = (
    "check_health",
    "checkpoint_prepare",
    "checkpoint_restore",
    "compute_weight_checksums",
    "get_encoder_timing_stats",
    "get_model_inspection",
    "init_weight_transfer_engine",
    "profile",
    "release_late_interaction_query_cache",
    "save_sharded_state",
    "shutdown_weight_transfer_engine",
    "start_draft_weight_update",
    "start_weight_update",
)
# These methods empty the encoder cache of the workers, but not that of vLLM's scheduler.
_EMPTY_CACHE = ("finish_weight_update", "reload_weights", "reset_weights", "update_weights")


def install() -> None:
    @wrap("vllm.v1.engine.async_llm:AsyncLLM.collective_rpc")
    async def collective_rpc_async(original: Any, llm: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return await original(llm, method, *args, **kwargs)
        finally:
            _after_call(llm, method)
            if method in _EMPTY_CACHE:
                await llm.reset_encoder_cache()

    @wrap("vllm.v1.engine.llm_engine:LLMEngine.collective_rpc")
    def collective_rpc(original: Any, llm: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(llm, method, *args, **kwargs)
        finally:
            _after_call(llm, method)
            if method in _EMPTY_CACHE:
                llm.reset_encoder_cache()


def _after_call(llm: Any, method: Any) -> None:
    if method not in _KEEP_WEIGHTS:
        llm.renderer.mm_processor.front_end.weights_changed()
