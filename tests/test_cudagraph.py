"""CUDA graphs of vLLM's encoder, in whose place is what counts. No GPU."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.worker.encoder_cudagraph import EncoderCudaGraphManager

from eadaprune_vllm.engine.cudagraph import encode
from eadaprune_vllm.engine.model import KEPT, MM_EMBEDS, Pruned
from eadaprune_vllm.patches import cudagraph

PIXELS = {"pixel_values": torch.zeros(2, 3)}


class Graphs:
    """Instead of a manager of vLLM's: it adds one where the model adds two."""

    captured = True

    def is_captured(self) -> bool:
        return self.captured

    def supports_modality(self, modality: str) -> bool:
        return modality == "image"

    def execute(self, kwargs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return tuple(kwargs["pixel_values"] + 1)


class Model(Pruned):
    def embed_multimodal(self, **kwargs: Any) -> Any:
        return tuple(kwargs["pixel_values"] + 2)


class Apart(Model):
    """Its features are others than its rows."""

    def eadaprune_encode(self, modality: str, **kwargs: Any) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
        rows = list(self.embed_multimodal(**kwargs))
        return rows, rows


def runners(manager: Graphs | None, model: Pruned) -> list[Any]:
    """vLLM's first and second model runner, as far as they are asked."""
    state = SimpleNamespace(encoder_runner=SimpleNamespace(cudagraph_manager=manager))
    of_both = SimpleNamespace(get_model=lambda: model)
    return [
        SimpleNamespace(encoder_cudagraph_manager=manager, **vars(of_both)),
        SimpleNamespace(model_state=state, **vars(of_both)),
    ]


def added(manager: Graphs | None, model: Pruned, modality: str = "image", eager: bool = False) -> set[float]:
    encoded = [encode(runner, modality, PIXELS, eager) for runner in runners(manager, model)]
    return {float(row.mean()) for rows, _ in encoded for row in rows}


def test_the_engine_encodes_by_graphs_where_there_are_any() -> None:
    assert added(Graphs(), Model()) == {1}
    assert added(None, Model()) == {2}
    assert added(Graphs(), Model(), modality="video") == {2}
    assert added(Graphs(), Model(), eager=True) == {2}
    assert added(Graphs(), Apart()) == {2}
    waiting = Graphs()
    waiting.captured = False
    assert added(waiting, Model()) == {2}


def test_pruned_embeddings_bypass_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EncoderCudaGraphManager, "execute", EncoderCudaGraphManager.execute)  # put back at the end
    cudagraph.install()
    manager = object.__new__(EncoderCudaGraphManager)
    monkeypatch.setattr(manager, "use_dp", False, raising=False)
    kept = {"image" + KEPT: torch.arange(3)}
    assert manager.execute(kept | {"image" + MM_EMBEDS: [torch.zeros(3, 4)]}) is None
    assert manager.execute(kept | PIXELS) is None  # with the decision of another instance
    with pytest.raises(AttributeError):  # it goes on to what this one lacks
        manager.execute(PIXELS)
