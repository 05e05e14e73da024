"""CUDA graphs of vLLM's encoder (``cudagraph_mm_encoder``): what the engine is asked about is encoded by them too."""

from collections.abc import Mapping
from typing import Any

import torch

from eadaprune_vllm.engine.model import Pruned


def encode(runner: Any, modality: str, kwargs: Mapping[str, Any], eager: bool) -> tuple[list[torch.Tensor], Any]:
    """What ``eadaprune_encode`` of the runner's model says about a batch; replayed from graphs where there are any for
    it, and the model does not encode in a way of its own.

    Args:
        runner: vLLM's first or second model runner.
        modality: of the batch.
        kwargs: what ``embed_multimodal`` takes.
        eager: whether its modules must be called, as graphs do not.
    """
    model, state = runner.get_model(), getattr(runner, "model_state", None)  # which the second one has
    manager = state.encoder_runner.cudagraph_manager if state else runner.encoder_cudagraph_manager
    own = type(model).eadaprune_encode is not Pruned.eadaprune_encode
    if eager or own or manager is None or not manager.is_captured() or not manager.supports_modality(modality):
        encoded: tuple[list[torch.Tensor], Any] = model.eadaprune_encode(modality, **kwargs)
        return encoded
    return list(manager.execute(kwargs)), None
