"""What a request must not exceed, checked before the engine would have to."""

from collections.abc import Mapping
from typing import Any

import torch
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.parse import DictEmbeddingItems, EmbeddingItems

from eadaprune_vllm.core.prune import finite


def check_length(model_config: Any, min_length: int) -> None:
    """Raises:
    VLLMValidationError: if a prompt of at least so many tokens can never fit.
    """
    longest = model_config.max_model_len
    if min_length > longest:
        raise VLLMValidationError(
            f"This model's maximum context length is {longest} tokens, and this request has at least {min_length}, "
            "however much its images and videos are pruned. Please send fewer.",
            parameter="messages",
            value=min_length,
        )


def check_positions(model_config: Any, position_slack: int) -> None:
    """Raises:
    VLLMValidationError: if positions could run off the model's table of rotary embeddings, which would stop the
        engine. vLLM makes tables for four times the model's length, and checks tokens only.
    """
    text = model_config.hf_text_config
    if not model_config.uses_mrope:
        return
    longest, rope = text.max_position_embeddings, getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") == "yarn":
        longest = int(rope["original_max_position_embeddings"] * rope["factor"])
    if model_config.max_model_len + position_slack > 4 * longest:
        raise VLLMValidationError(
            f"the images and videos of this request span up to {position_slack} positions more than it has tokens, "
            f"and this model has {4 * longest} positions in all; send fewer, smaller or less pruned ones",
            parameter="messages",
        )


def check_finite(modality: str, items: Any, dtype: torch.dtype) -> None:
    """Raises:
    VLLMValidationError: if embeddings of a client are not finite in the model's dtype. In the KV cache they would
        outlive their request and spoil others.
    """
    if not isinstance(items, EmbeddingItems | DictEmbeddingItems):
        return
    for index, item in enumerate(items):
        tensors = item.values() if isinstance(item, Mapping) else [item]
        if not all(finite(of.to(dtype)) for of in tensors if of is not None and of.is_floating_point()):
            raise VLLMValidationError(
                f"embeddings of {modality} {index} hold NaN, infinity or values too large for {dtype}",
                parameter="messages",
            )
