"""Decisions about tensors of a GPU, on a fake one: nothing mixes devices, and launching waits for nothing."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_device import CUDA, fake_device, to_device, waits
from samples import item

from eadaprune_vllm.core.layout import Layout, Newlines
from eadaprune_vllm.core.options import SELECTOR_NAMES, PruneOptions
from eadaprune_vllm.core.server_options import ServerOptions
from eadaprune_vllm.engine import decide
from eadaprune_vllm.messages import DecisionRequest, DecisionResult


class Model:
    """Embeddings are the item's pixels, and features their first half."""

    config = None
    eadaprune_captures_attention = False

    def __init__(self, newlines: bool) -> None:
        self.newlines = newlines

    def eadaprune_encode(self, modality: str, rows: Any, **_: Any) -> tuple[list[torch.Tensor], None]:
        return list(rows), None

    def eadaprune_features(self, embeds: torch.Tensor) -> torch.Tensor:
        return embeds[:, : embeds.shape[1] // 2]

    def eadaprune_layout(self, config: Any, modality: str, data: Mapping[str, Any], num_placeholders: int) -> Layout:
        if not self.newlines:
            return Layout.whole(1, num_placeholders)
        tokens, mask = num_placeholders - 1, torch.arange(num_placeholders) == num_placeholders - 1
        part = torch.arange(tokens) % 3  # interleaved, as tiles of an image are
        return Layout(part, ((1, tokens),), Newlines(mask, torch.zeros(tokens).long()))


def decisions(
    device: torch.device, count: int, size: int, newlines: bool, budget: str, explain: bool, **options: Any
) -> tuple[list[DecisionResult], list[str]]:
    """About images of as many tokens, and why launching waited for the device."""
    multimodal = SimpleNamespace(
        mm_encoder_tp_mode="weights", eadaprune=ServerOptions.model_validate({"budget": budget})
    )
    config = SimpleNamespace(
        model_config=SimpleNamespace(multimodal_config=multimodal),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
    )
    model = Model(newlines)
    runner = SimpleNamespace(get_model=lambda: model, device=device, vllm_config=config, encoder_cudagraph_manager=None)
    chosen = PruneOptions.model_validate({"energy": 0.8, "min_tokens": 1} | options)
    generator, requests = torch.Generator().manual_seed(0), []
    for _ in range(count):
        rows = torch.randn(size, 64, generator=generator) * torch.arange(1, 65.0) ** -1
        requests.append(DecisionRequest("image", item("image", rows=rows.bfloat16()), chosen.key, size, explain))
    run = decide.launch(runner, requests)
    launching = list(waits)
    found = run()
    assert all(isinstance(each, DecisionResult) for each in found), found
    return [each for each in found if isinstance(each, DecisionResult)], launching


CASES: dict[str, dict[str, Any]] = {selector: {"selector": selector} for selector in SELECTOR_NAMES}
CASES |= {
    "newlines": {"newlines": True},
    "the whole of tiles": {"newlines": True, "scope": "image"},
    "windows": {"size": 1500},
    "more tokens than features": {"size": 200},
    "float64": {"energy": 0.99999},
    "every token": {"energy": 1.0, "max_tokens": 48},
    "budgets by span": {"budget": "span"},
    "an explanation": {"explain": True},
}


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("name", CASES)
def test_decisions_on_a_gpu_are_those_on_a_cpu(name: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case: dict[str, Any] = {
        "size": 48,
        "newlines": False,
        "budget": "spectrum",
        "explain": False,
        "count": count,
    } | CASES[name]
    expected, _ = decisions(torch.device("cpu"), **case)
    monkeypatch.setattr(decide, "group_and_batch_mm_kwargs", batches)
    with fake_device(monkeypatch):
        found, launching = decisions(CUDA, **case)
    assert launching == []
    assert waits  # but the thread does
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.decision.indices, theirs.decision.indices)
        assert torch.equal(ours.embeds, theirs.embeds)
        assert ours.embeds.device.type == "cpu"


def batches(items: Any, device: torch.device, pin_memory: bool) -> Any:
    """vLLM's, which copies to the device without waiting."""
    rows = torch.stack([item.get_data()["rows"] for _, item in items])
    yield "image", len(items), {"rows": to_device(rows)}
