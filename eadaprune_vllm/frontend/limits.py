"""Limits of a request that are checked in the front end, before the engine is involved."""

from collections.abc import Mapping
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.multimodal.parse import DictEmbeddingItems, EmbeddingItems

from eadaprune_vllm.architectures import adapter
from eadaprune_vllm.core.prune import finite


def check_length(model_config: Any, min_length: int) -> None:
    """Raises:
    VLLMValidationError: if a prompt of at least ``min_length`` tokens is too long for the model.
    """
    longest = model_config.max_model_len
    if min_length > longest:
        raise VLLMValidationError(
            f"This model's maximum context length is {longest} tokens, and this request has at least {min_length}, "
            "even with its images and videos pruned as far as possible. Please send fewer.",
            parameter="messages",
            value=min_length,
        )


def check_positions(model_config: Any, position_slack: int) -> None:
    """Raises:
    VLLMValidationError: if M-RoPE positions could exceed the table of rotary embeddings, which would stop the engine.
        The table has four times the model's length; vLLM checks the number of tokens only.
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


def are_embeddings(mm_items: Any) -> bool:
    """Whether the client sent embeddings."""
    return isinstance(mm_items, EmbeddingItems | DictEmbeddingItems)


def check_embeddings(modality: str, index: int, item: Any, model_config: Any, may_be_missing: bool) -> None:
    """Raises:
    VLLMValidationError: if a client's embeddings of an item cannot be pruned for this model, are missing (vLLM allows
        this on instances that take embeddings or KV cache of others), or are not finite in the model's dtype: in the KV
        cache they would affect later requests.
    """
    if not adapter(model_config.architecture).eadaprune_takes_embeddings:
        raise VLLMValidationError(
            f"embeddings of {modality}s are not supported for this model: they come without their layout",
            parameter="messages",
        )
    tensors = [*item.values()] if isinstance(item, Mapping) else [item]
    embeddings = [each for each in tensors if each is not None and each.is_floating_point()]
    if not embeddings and not may_be_missing:
        raise VLLMValidationError(
            f"embeddings of {modality} {index} are missing, and no other instance decided about it",
            parameter="messages",
        )
    if not all(finite(each.to(model_config.dtype)) for each in embeddings):
        raise VLLMValidationError(
            f"embeddings of {modality} {index} hold NaN, infinity or values too large for {model_config.dtype}",
            parameter="messages",
        )
