"""CUDA graphs of vLLM's encoder: rows that are ready pass them by."""

from typing import Any

from eadaprune_vllm.engine.model import ready_embeds
from eadaprune_vllm.patching import wrap


def install() -> None:
    @wrap("vllm.v1.worker.encoder_cudagraph:EncoderCudaGraphManager.execute")
    def execute(original: Any, manager: Any, mm_kwargs: Any) -> Any:
        # Whoever gets None has the model embed them.
        return original(manager, mm_kwargs) if ready_embeds(mm_kwargs) is None else None
