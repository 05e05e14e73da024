"""CUDA graphs of vLLM's encoder: pruned items bypass them."""

from typing import Any

from eadaprune_vllm.engine.model import is_pruned
from eadaprune_vllm.patching import wrap


def install() -> None:
    @wrap("vllm.v1.worker.encoder_cudagraph:EncoderCudaGraphManager.execute")
    def execute(original: Any, manager: Any, mm_kwargs: Any) -> Any:
        # If this returns None, vLLM calls the model's embed_multimodal.
        return None if is_pruned(mm_kwargs) else original(manager, mm_kwargs)
