"""Small questions and answers, as front ends and engines exchange them."""

import torch
from msgspec.structs import replace
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItem

from eadaprune_vllm.core.layout import Layout, Newlines
from eadaprune_vllm.core.options import PruneOptions
from eadaprune_vllm.core.prune import Encoding, PruneDecision, prune
from eadaprune_vllm.core.selectors import VisualTokens
from eadaprune_vllm.messages import DecisionRequest, DecisionResult, Explanation


def item(modality: str = "image", on_cpu: tuple[str, ...] = (), **fields: torch.Tensor) -> MultiModalKwargsItem:
    """What vLLM sends of one image or video. Fields ``on_cpu`` stay there."""
    elements = {}
    for name, value in fields.items():
        config = MultiModalFieldConfig.batched(modality, keep_on_cpu=name in on_cpu)
        (elements[name],) = config.build_elems(name, [value])
    return MultiModalKwargsItem(elements)


def question(
    num_placeholders: int = 4, *, name: int = 0, options: str = "{}", modality: str = "image"
) -> DecisionRequest:
    """About an image that is nothing but its name."""
    return DecisionRequest(modality, item(modality, name=torch.tensor(name)), options, num_placeholders)


def name_of(question: DecisionRequest) -> int:
    return int(question.item.get_data()["name"])


def kept(k: int = 2, newlines: bool = False) -> PruneDecision:
    """So many of four tokens; with newlines, of two lines."""
    mask = torch.tensor([False, False, True, False, False, True])
    ends = Newlines(mask, torch.tensor([0, 0, 1, 1])) if newlines else None
    encoding = Encoding(
        VisualTokens(torch.eye(4, 6), None), Layout(torch.zeros(4).long(), ((2, 2),), ends, mrope_span=3)
    )
    return prune(encoding, PruneOptions(energy=0.5, min_tokens=k, max_tokens=k))


def explained(k: int = 2) -> DecisionResult:
    """What is decided, with what that rests on, and without rows."""
    return replace(
        decided(k, torch.empty(0, 3)), explanation=Explanation([(1, 0.5), (4, 1.0)], torch.arange(4) / 4, [(2, 2)])
    )


def decided(k: int = 2, rows: torch.Tensor | None = None) -> DecisionResult:
    made = kept(k)
    return DecisionResult(made, torch.randn(len(made.placeholders), 3) if rows is None else rows, {"encode": 0.25})
