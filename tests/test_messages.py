"""What front ends and engine say to each other arrives as it was said."""

import struct
from dataclasses import fields, replace

import msgspec
import pytest
import torch
from samples import decided, item, kept

from eadaprune_vllm.core.prune import PruneDecision
from eadaprune_vllm.messages import (
    DecisionError,
    DecisionRequest,
    DecisionResponse,
    DecisionResult,
    Explanation,
    pack,
    unpack_requests,
    unpack_responses,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def assert_same_decision(one: PruneDecision, other: PruneDecision) -> None:
    for field in fields(PruneDecision):
        left, right = getattr(one, field.name), getattr(other, field.name)
        assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right, field.name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 7), (0, 7), (300, 64)])
def test_embeddings_survive_packing_bit_for_bit(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Short tensors travel within the message, long ones beside it."""
    rows = torch.randn(shape).to(dtype)
    (found,) = unpack_responses(pack([decided(rows=rows)]))
    assert isinstance(found, DecisionResult)
    assert found.embeds.dtype == dtype
    assert torch.equal(found.embeds, rows)


@pytest.mark.parametrize("newlines", [False, True])
def test_decision_survives_packing(newlines: bool) -> None:
    explanation = Explanation([(1, 0.5), (4, 1.0)], torch.rand(4, dtype=torch.float64), [(2, 2), (1, 3)])
    said = DecisionResult(kept(3, newlines), torch.zeros(0, 2), {"encode": 0.5, "select": 0.25}, explanation)
    (found,) = unpack_responses(pack([said]))
    assert isinstance(found, DecisionResult)
    assert_same_decision(found.decision, said.decision)
    assert found.decision.newlines == (2 if newlines else 0)
    assert found.seconds == said.seconds
    assert found.explanation
    assert (found.explanation.curve, found.explanation.grids) == (explanation.curve, explanation.grids)
    assert torch.equal(found.explanation.thresholds, explanation.thresholds)


def test_errors_keep_their_place_among_results() -> None:
    said: list[DecisionResponse] = [
        decided(1),
        DecisionError("no memory"),
        decided(3),
        DecisionError("NaN", "features"),
    ]
    found = unpack_responses(pack(said))
    assert [type(answer) for answer in found] == [DecisionResult, DecisionError, DecisionResult, DecisionError]
    assert [answer for answer in found if isinstance(answer, DecisionError)] == said[1::2]
    assert [len(answer.decision) for answer in found if isinstance(answer, DecisionResult)] == [1, 3]


def test_responses_do_not_share_memory() -> None:
    """One may be cached for long after the others are gone."""
    many = replace(kept(), indices=torch.arange(200), placeholders=torch.arange(200))
    for answer in unpack_responses(pack([DecisionResult(many, torch.randn(200, 64), {}) for _ in range(3)])):
        assert isinstance(answer, DecisionResult)
        for tensor in (answer.embeds, answer.decision.indices, answer.decision.placeholders):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
            tensor += 1  # it is writable


@pytest.mark.parametrize("dtype", DTYPES)
def test_items_survive_packing(dtype: torch.dtype) -> None:
    pixels, grid = torch.randn(30, 40).to(dtype), torch.tensor([1, 4, 6])
    said = [
        DecisionRequest("image", item("image", ("image_grid_thw",), pixel_values=pixels, image_grid_thw=grid), "{}", 6),
        DecisionRequest("video", item("video", pixel_values_videos=pixels[:2]), '{"energy":0.5}', 1, explain=True),
    ]
    found = unpack_requests(pack(said))
    assert [(each.modality, each.options, each.num_placeholders, each.explain) for each in found] == [
        ("image", "{}", 6, False),
        ("video", '{"energy":0.5}', 1, True),
    ]
    image, video = (each.item for each in found)
    assert {name: element.field.keep_on_cpu for name, element in image.items()} == {
        "pixel_values": False,
        "image_grid_thw": True,
    }
    assert image.get_data()["pixel_values"].dtype == dtype
    assert torch.equal(image.get_data()["pixel_values"], pixels)
    assert torch.equal(image.get_data()["image_grid_thw"], grid)
    assert torch.equal(video.get_data()["pixel_values_videos"], pixels[:2])


def test_empty_batches_survive_packing() -> None:
    assert unpack_requests(pack([])) == []
    assert unpack_responses(pack([])) == []


def test_truncated_payloads_are_rejected() -> None:
    data = pack([DecisionRequest("image", item(pixel_values=torch.randn(30, 40)), "{}", 6)])
    (first,) = struct.unpack_from("<Q", data)
    cuts: list[tuple[int, type[Exception]]] = [
        (4, struct.error),  # in the size of a frame
        (8 + first // 2, msgspec.DecodeError),  # in the first frame
        (8 + first, IndexError),  # before the tensor, which is a frame of its own
        (len(data) - 1, RuntimeError),  # in the tensor
    ]
    for length, error in cuts:
        with pytest.raises(error):
            unpack_requests(data[:length])
