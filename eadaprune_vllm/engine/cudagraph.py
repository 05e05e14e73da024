"""Encoding with the CUDA graphs of vLLM's encoder (``cudagraph_mm_encoder``), where there are any."""

from collections.abc import Mapping
from typing import Any

import torch

from eadaprune_vllm.engine.model import Pruned


def encode(runner: Any, modality: str, kwargs: Mapping[str, Any], eager: bool) -> tuple[list[torch.Tensor], Any]:
    """``eadaprune_encode`` of a batch, by CUDA graphs if they were captured and the adapter does not override it.

    Args:
        runner: vLLM's model runner, of version 1 or 2.
        modality: of the batch.
        kwargs: arguments of ``embed_multimodal``.
        eager: whether modules must be called, because hooks need it.
    """
    model, state = runner.get_model(), getattr(runner, "model_state", None)  # only version 2 has a state
    manager = state.encoder_runner.cudagraph_manager if state else runner.encoder_cudagraph_manager
    is_overridden = type(model).eadaprune_encode is not Pruned.eadaprune_encode
    if (
        eager
        or is_overridden
        or manager is None
        or not manager.is_captured()
        or not manager.supports_modality(modality)
    ):
        encoded: tuple[list[torch.Tensor], Any] = model.eadaprune_encode(modality, **kwargs)
        return encoded
    # Decisions are made while the graph may be replayed, and not every tower returns copies of its buffers.
    return [embeds.clone() for embeds in manager.execute(kwargs)], None
