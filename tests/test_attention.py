"""How much attention patches draw, as it is observed in a tower."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from eadaprune_vllm.engine import attention
from eadaprune_vllm.engine.attention import capturing, received_attention

HEADS, SIZE = 3, 5


class OptionSource(torch.nn.Module):
    """Attention, as vLLM's towers call it."""

    head_size, scale, attn_backend = SIZE, 0.4, AttentionBackendEnum.TORCH_SDPA

    def forward(self, query: Any, key: Any, value: Any, cu_seqlens: Any = None, max_seqlen: Any = None) -> Any:
        return value


class Tower(torch.nn.Module):
    """Of two layers."""

    def __init__(self, has_cls: bool) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([OptionSource(), OptionSource()])
        self.eadaprune_has_cls = has_cls


@pytest.fixture(autouse=True)
def _layers_are_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MMEncoderAttention", OptionSource)
    monkeypatch.setattr(attention, "get_tensor_model_parallel_world_size", lambda: 1)


def weights(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Attention weights ``[heads, q, n]``, of ``[heads, q, d]`` and ``[heads, n, d]``."""
    return (query @ key.transpose(1, 2) * 0.4).softmax(-1)


def heads(flat: torch.Tensor) -> torch.Tensor:
    """``[heads, n, d]``, of ``[n, heads * d]``."""
    return flat.view(len(flat), HEADS, SIZE).transpose(0, 1)


def test_it_is_the_mean_over_heads_and_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = torch.randn(3, 7, 5), torch.randn(3, 9, 5)
    expected = weights(query, key).mean((0, 1))
    torch.testing.assert_close(received_attention(query, key, 0.4), expected)
    for held in (1, 60):  # one and two queries at a time
        monkeypatch.setattr(attention, "_MAX_WEIGHTS", held)
        torch.testing.assert_close(received_attention(query, key, 0.4), expected)


def test_it_is_computed_in_float32() -> None:
    query, key = torch.randn(3, 7, 5).bfloat16(), torch.randn(3, 9, 5).bfloat16()
    found = received_attention(query, key, 0.4)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, weights(query.float(), key.float()).mean((0, 1)))


@pytest.mark.parametrize("has_cls", [False, True])
def test_each_image_of_a_batch_in_the_last_layer_counts(has_cls: bool) -> None:
    """With a CLS token, what this token attends to."""
    tower, query, key = Tower(has_cls), torch.randn(2, 6, HEADS * SIZE), torch.randn(2, 6, HEADS * SIZE)
    with capturing(tower, True) as found:
        tower.layers[0](key, query, key)
        tower.layers[1](query, key, value=key)
    of_each = [weights(heads(q), heads(k)) for q, k in zip(query, key, strict=True)]
    expected = [each[:, 0].mean(0) if has_cls else each.mean((0, 1)) for each in of_each]
    torch.testing.assert_close(found(), torch.cat(expected))


@pytest.mark.parametrize("split_heads", [False, True])
def test_packed_sequences_are_separated(split_heads: bool) -> None:
    tower, query, key = Tower(False), torch.randn(1, 6, HEADS * SIZE), torch.randn(1, 6, HEADS * SIZE)
    given = [x.view(1, 6, HEADS, SIZE) if split_heads else x for x in (query, key)]
    with capturing(tower, True) as found:
        tower.layers[1](query=given[0], key=given[1], value=key, cu_seqlens=torch.tensor([0, 4, 6]))
    parts = [weights(heads(query[0, span]), heads(key[0, span])) for span in (slice(0, 4), slice(4, 6))]
    torch.testing.assert_close(found(), torch.cat([part.mean((0, 1)) for part in parts]))


def test_attention_is_captured_only_if_wanted() -> None:
    tower, rows = Tower(False), torch.randn(1, 6, HEADS * SIZE)
    with capturing(tower, False) as found:
        tower.layers[1](rows, rows, rows)
    assert found() is None
    with capturing(tower, True) as found:
        pass
    tower.layers[1](rows, rows, rows)  # afterwards
    assert found() is None


def test_attention_is_averaged_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank has some of them."""
    tower, rows = Tower(False), torch.randn(1, 6, HEADS * SIZE)
    others = torch.rand(6)
    summed: Callable[[torch.Tensor], torch.Tensor] = lambda own: own + others  # noqa: E731
    monkeypatch.setattr(attention, "get_tensor_model_parallel_world_size", lambda: 2)
    monkeypatch.setattr(attention, "tensor_model_parallel_all_reduce", summed)
    with capturing(tower, True) as found:
        tower.layers[1](rows, rows, rows)
    own = weights(heads(rows[0]), heads(rows[0])).mean((0, 1))
    torch.testing.assert_close(found(), (own + others) / 2)


def test_flashinfer_attention_is_not_captured() -> None:
    tower = Tower(has_cls=False)
    for layer in tower.layers:
        layer.attn_backend = AttentionBackendEnum.FLASHINFER
    with capturing(tower, wanted=True) as attention:
        tower.layers[0](*torch.randn(3, 1, 4, HEADS, SIZE))
        tower.layers[1](*torch.randn(3, 1, 4, HEADS, SIZE), torch.tensor([0, 60, 30, 90]))
    assert attention() is None
