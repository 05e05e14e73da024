"""The attention that each patch receives in the last layer of a vision tower, for selectors that need it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.attention import MMEncoderAttention
from vllm.v1.attention.backends.registry import AttentionBackendEnum

_MAX_WEIGHTS = 2**24  # attention weights in memory at a time


@contextmanager
def capturing(model: Any, wanted: bool) -> Iterator[Callable[[], torch.Tensor | None]]:
    """Context manager that captures attention in the last layer of the model's vision tower.

    Not possible in compiled towers, whose layers call no hooks, nor with FlashInfer, which has its own format of
    sequence lengths.

    Args:
        model: one of ours.
        wanted: whether to capture at all.

    Yields:
        A function that returns the attention that each patch received, ``[n]`` float32 over all sequences, averaged
        over heads and queries (with a CLS token: over heads, of this token's query); None if none was captured.
    """
    layers = [module for module in model.modules() if isinstance(module, MMEncoderAttention)] if wanted else []
    layers = [layer for layer in layers if layer.attn_backend is not AttentionBackendEnum.FLASHINFER]
    found: list[torch.Tensor] = []

    def capture(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ends = kwargs.get("cu_seqlens")
        query, key = (
            _sequences(heads.view(*heads.shape[:2], -1, layer.head_size), ends)
            for heads in [*args, *kwargs.values()][:2]
        )
        queries = 1 if model.eadaprune_has_cls else None
        found.extend(received_attention(q[:, :queries], k, layer.scale) for q, k in zip(query, key, strict=True))

    hooks = [layer.register_forward_pre_hook(capture, with_kwargs=True) for layer in layers[-1:]]
    try:
        yield lambda: _mean_over_ranks(torch.cat(found)) if found else None
    finally:
        for hook in hooks:
            hook.remove()


def received_attention(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """The attention that each token receives, ``[n]`` float32, averaged over heads and queries.

    Args:
        query: ``[heads, q, d]``.
        key: ``[heads, n, d]``.
        scale: of their products.
    """
    heads, queries, _ = query.shape
    keys = key.float().transpose(1, 2)
    total = keys.new_zeros(key.shape[1])
    for chunk in torch.split(query, max(1, _MAX_WEIGHTS // (heads * key.shape[1])), 1):
        total += (chunk.float() @ keys * scale).softmax(-1).sum((0, 1))
    return total / (heads * queries)


def _sequences(heads: torch.Tensor, ends: torch.Tensor | None) -> list[torch.Tensor]:
    """Split ``[batch, length, heads, d]`` into ``[heads, n, d]`` per sequence.

    Args:
        heads: of a batch, or of one row with several sequences,
        ends: if these are the cumulative lengths of the sequences in that row.
    """
    sequences = [*heads] if ends is None else [*torch.split(heads[0], ends.diff().tolist())]
    return [sequence.transpose(0, 1) for sequence in sequences]


def _mean_over_ranks(attention: torch.Tensor) -> torch.Tensor:
    """The mean over the heads of all tensor-parallel ranks."""
    size = get_tensor_model_parallel_world_size()
    return tensor_model_parallel_all_reduce(attention) / size if size > 1 else attention
