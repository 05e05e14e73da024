"""How much attention each patch draws in the last layer of a vision tower, for selectors that go by it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.attention import MMEncoderAttention
from vllm.v1.attention.backends.registry import AttentionBackendEnum

_WEIGHTS = 2**24  # how many attention weights are held at a time


@contextmanager
def capturing(model: Any, wanted: bool) -> Iterator[Callable[[], torch.Tensor | None]]:
    """While open, attention in the last layer of the model's tower is observed, unless its layers run as one compiled
    piece, or where sequences end is told in FlashInfer's own way.

    Args:
        model: one of ours.
        wanted: whether to observe at all.

    Yields:
        What says how much attention each patch drew, ``[n]`` float32 over all sequences one after the other, averaged
        over heads and queries; in towers with a CLS token, attention of this token. None if nothing was observed.
    """
    layers = [module for module in model.modules() if isinstance(module, MMEncoderAttention)] if wanted else []
    layers = [layer for layer in layers if layer.attn_backend is not AttentionBackendEnum.FLASHINFER]
    found: list[torch.Tensor] = []

    def observe(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ends = kwargs.get("cu_seqlens")
        query, key = (
            _sequences(heads.view(*heads.shape[:2], -1, layer.head_size), ends)
            for heads in [*args, *kwargs.values()][:2]
        )
        queries = 1 if model.eadaprune_has_cls else None
        found.extend(drawn(q[:, :queries], k, layer.scale) for q, k in zip(query, key, strict=True))

    hooks = [layer.register_forward_pre_hook(observe, with_kwargs=True) for layer in layers[-1:]]
    try:
        yield lambda: _over_ranks(torch.cat(found)) if found else None
    finally:
        for hook in hooks:
            hook.remove()


def drawn(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """How much attention each token draws, ``[n]`` float32, averaged over heads and queries.

    Args:
        query: ``[heads, q, d]``.
        key: ``[heads, n, d]``.
        scale: of their products.
    """
    heads, queries, _ = query.shape
    keys = key.float().transpose(1, 2)
    total = keys.new_zeros(key.shape[1])
    for some in torch.split(query, max(1, _WEIGHTS // (heads * key.shape[1])), 1):
        total += (some.float() @ keys * scale).softmax(-1).sum((0, 1))
    return total / (heads * queries)


def _sequences(heads: torch.Tensor, ends: torch.Tensor | None) -> list[torch.Tensor]:
    """``[heads, n, d]`` of each sequence, of ``[batch, length, heads, d]`` and where sequences end in it, if they are
    not one to a row."""
    of_each = [*heads] if ends is None else [*torch.split(heads[0], ends.diff().tolist())]
    return [sequence.transpose(0, 1) for sequence in of_each]


def _over_ranks(attention: torch.Tensor) -> torch.Tensor:
    """The mean over the heads of all ranks."""
    size = get_tensor_model_parallel_world_size()
    return tensor_model_parallel_all_reduce(attention) / size if size > 1 else attention
