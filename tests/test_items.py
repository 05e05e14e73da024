"""Items of a request: their placeholders, their reports, and their names in caches."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from samples import decided, item, kept
from vllm.exceptions import VLLMServerError, VLLMValidationError
from vllm.multimodal.processing.processor import ResolvedPromptUpdate, UpdateMode

from eadaprune_vllm.core.options import PruneOptions
from eadaprune_vllm.core.prune import PruneDecision
from eadaprune_vllm.core.report import Timing
from eadaprune_vllm.frontend.items import Item, Items, PrunedDetails, client_modalities, digest, may_prune, split
from eadaprune_vllm.frontend.pending import PendingItem
from eadaprune_vllm.messages import DecisionError, DecisionRequest, DecisionResponse
from eadaprune_vllm.patches import input_processor
from eadaprune_vllm.reference import as_mm_data

IMAGE, TIME = 7, 60


def placeholders(*full: int) -> PrunedDetails:
    """Of which the tokens ``IMAGE`` are embeddings."""
    return PrunedDetails([*full], lambda given: torch.tensor(given) == IMAGE)


def one(**options: Any) -> Item:
    chosen = PruneOptions.model_validate(options)
    return Item("image", "image", "image-options", chosen, chosen.threshold)


def new(*, needs_decision: bool = True, is_client_embedding: bool = False) -> PendingItem:
    """Of an image of four placeholders between two tokens of text."""
    data = item("image", ("image_grid_thw",), pixel_values=torch.zeros(9), image_grid_thw=torch.tensor([1, 4, 4]))
    content = placeholders(TIME, *[IMAGE] * 4, TIME)
    update = ResolvedPromptUpdate("image", 0, UpdateMode.REPLACE, [IMAGE], content)
    return PendingItem(DecisionRequest("image", data, "{}", 4), update, needs_decision, is_client_embedding)


def test_rendered_requests_are_identified_by_kept_tokens() -> None:
    """As images are that are decided on here."""
    whole, pruned = new(), new()
    pruned.set_response(decided(2))
    data, update = pruned.pruned()
    features = [
        SimpleNamespace(modality="image", identifier="a", data=data),
        SimpleNamespace(modality="image", identifier="b", data=whole.request.item),
        SimpleNamespace(modality="image", identifier="c", data=None),
    ]
    input_processor._identify(features)
    assert update.content.decision
    names = ["a" + digest(update.content.decision.placeholders), "b", "c"]
    assert [feature.identifier for feature in features] == names


def test_tokens_are_placeholders_unless_it_says_which() -> None:
    assert PrunedDetails([1, 2, 3]).embeds.tolist() == [True] * 3
    assert placeholders(TIME, IMAGE, IMAGE).embeds.tolist() == [False, True, True]


def test_dropped_placeholders_are_removed_between_text() -> None:
    frames = placeholders(60, IMAGE, IMAGE, 61, 62, IMAGE, IMAGE, 63)
    for stays, left in (
        ([0, 1, 2, 3], [60, IMAGE, IMAGE, 61, 62, IMAGE, IMAGE, 63]),
        ([1, 2], [60, IMAGE, 61, 62, IMAGE, 63]),
        ([3], [60, 61, 62, IMAGE, 63]),
    ):
        decision = replace(kept(1), placeholders=torch.tensor(stays))
        found = frames.pruned(decision)
        assert found.full == left
        assert int(found.embeds.sum()) == len(stays)
        assert found.decision is decision
    assert len(frames.full) == 8  # it is the cached one of others


def test_pruned_is_embed_is_independent_of_the_original() -> None:
    """It may know of nothing but the unpruned tokens."""
    mask = torch.tensor([False, True, True, True, True, False])
    found = PrunedDetails([60, 1, 2, 3, 4, 61], lambda _: mask).pruned(kept(2))
    assert found.embeds.tolist() == [False, True, True, False]
    assert PrunedDetails([1, 2, 3, 4]).pruned(kept(2)).is_embed is None


def test_newlines_are_counted() -> None:
    assert PrunedDetails([IMAGE] * 6, num_newlines=2).pruned(kept(2, newlines=True)).num_newlines == 1


def test_identifiers_depend_on_kept_tokens_only() -> None:
    def identifier(decision: PruneDecision | None, weights: float = 0.0) -> str:
        found = Items({}, weights_changed_at=weights)
        content = PrunedDetails([IMAGE] * 4)
        found.add_report(one(), content.pruned(decision) if decision else content)
        (name,) = found.identifiers.values()
        return name

    whole = identifier(None)
    assert whole == one().image_hash == identifier(None, weights=1.5)  # vLLM's own
    same = replace(kept(2), spectral_energy=0.1, selector="random", bound=None)
    assert identifier(kept(2)) == identifier(same) != whole
    others = [torch.tensor(stays) for stays in ([0], [1], [0, 1], [0, 2], [1, 2], [0, 1, 2, 3])]
    names = {identifier(replace(kept(2), placeholders=stays)) for stays in others}
    assert len(names) == len(others)
    stored_as = {int(name.removeprefix(whole), 16) & 0xFFFF for name in names}  # by LMCache
    assert len(stored_as) == len(others)
    assert identifier(kept(2), weights=1.5) not in {identifier(kept(2)), identifier(kept(2), weights=2.5)}


def test_the_report_of_a_decision() -> None:
    about = replace(one(energy=0.5, min_tokens=2, max_tokens=2, selector="attention"), requested=0.75, cached=True)
    found = PrunedDetails([IMAGE] * 6, num_newlines=2).pruned(kept(2, newlines=True)).report(about)
    assert (found.visual_tokens, found.kept_tokens, found.newline_tokens) == (6, 3, 1)
    assert (found.energy_threshold, found.energy_requested) == (0.5, 0.75)
    assert (found.spectral_energy, found.span_energy) == pytest.approx((0.5, 0.5))
    assert (found.selector, found.cached) == ("span", True)  # nothing is known about attention


def test_report_without_a_decision() -> None:
    found = replace(placeholders(TIME, IMAGE, IMAGE), num_newlines=1).report(one(energy=1.0, selector="hybrid"))
    assert (found.visual_tokens, found.kept_tokens, found.newline_tokens) == (2, 2, 1)
    assert (found.energy_threshold, found.spectral_energy, found.span_energy, found.bound) == (1.0, 1.0, 1.0, None)
    assert (found.selector, found.cached) == ("hybrid", False)


def test_embeddings_are_sent_instead_of_pixels() -> None:
    """With what vLLM leaves on the CPU: positions are computed by it."""
    found, answer = new(), decided(2)
    found.set_response(answer)
    sent, update = found.pruned()
    assert {name: element.field.keep_on_cpu for name, element in sent.items()} == {
        "image_grid_thw": True,
        "image_mm_embeds": False,
        "image_kept": True,
    }
    assert torch.equal(sent.get_data()["image_mm_embeds"], answer.embeds)
    assert torch.equal(sent.get_data()["image_kept"], answer.decision.placeholders)
    assert update.content.full == [TIME, IMAGE, IMAGE, TIME]
    assert update.content.embeds.sum() == len(answer.embeds)
    assert new().update.content.full == found.update.content.full  # another request may share it


def test_pixels_are_freed_once_decided() -> None:
    found = new()
    found.set_response(decided())
    assert list(found.request.item) == ["image_grid_thw"]


def test_items_that_keep_everything_are_sent_as_by_vllm() -> None:
    found = new(needs_decision=False)
    assert found.pruned() == (found.request.item, found.update)
    assert "pixel_values" in found.pruned()[0]
    assert found.min_placeholders(PruneOptions(min_tokens=2)) == 4


@pytest.mark.parametrize(("min_tokens", "fewest"), [(1, 1), (3, 3), (16, 4)])
def test_at_least_so_many_stay(min_tokens: int, fewest: int) -> None:
    assert new().min_placeholders(PruneOptions(min_tokens=min_tokens)) == fewest


@pytest.mark.parametrize(("own", "error"), [(True, VLLMValidationError), (False, VLLMServerError)])
def test_errors_are_the_clients_fault_for_client_embeddings_only(own: bool, error: type[Exception]) -> None:
    found = new(is_client_embedding=own)
    found.set_response(DecisionError("NaN in this image"))
    for ask in (found.decided, found.pruned):
        with pytest.raises(error, match="NaN in this image"):
            ask()


@pytest.mark.parametrize(
    ("options", "may"),
    [
        ({}, False),
        ({"energy": 0.5}, True),
        ({"energy": 1.0}, False),
        ({"energy": 1.0, "max_tokens": 20}, True),
        ({"enabled": False, "energy": 0.5, "max_tokens": 20}, False),
    ],
)
def test_options_that_may_drop_tokens(options: dict[str, Any], may: bool) -> None:
    assert may_prune(PruneOptions.model_validate(options)) is may


def items(*names: str, energy: float = 0.5) -> Items:
    """One image of each name."""
    options = PruneOptions(energy=energy)
    return Items({"image": [Item("image", name, f"{name}-options", options, energy) for name in names]})


def test_one_prunable_item_makes_the_request_prunable() -> None:
    found = items("a", "b", energy=1.0)
    assert not found.any_prunable
    found.by_modality["image"][1] = replace(found.by_modality["image"][1], options=PruneOptions(energy=0.5))
    assert found.any_prunable


def test_only_undecided_items_are_requested() -> None:
    found = items("a")
    answered = new()
    answered.set_response(decided())
    found.pending = {"answered": answered, "whole": new(needs_decision=False), "open": new()}
    assert found.undecided() == [found.pending["open"]]


def test_report_of_a_request() -> None:
    found, decisions = items("a", "b"), (kept(1), kept(2))
    answers: list[DecisionResponse] = [decided(1), decided(2)]
    for name, answer in zip("ab", answers, strict=True):
        found.pending[f"{name}-options"] = made = new()
        made.set_response(answer)
        made.timing = Timing("image", 0, {"encode": 0.5, "select": 0.25})
    for each, decision in zip(found.by_modality["image"], decisions, strict=True):
        found.add_report(each, PrunedDetails([IMAGE] * 4).pruned(decision))
    pruning = found.pruning(kv_bytes_per_token=10)
    assert [report.kept_tokens for report in pruning.of("image")] == [1, 2]
    assert (pruning.seconds, len(pruning.timings), pruning.kv_bytes_per_token) == (1.5, 2, 10)
    assert found.position_slack == (3 - 1) + (3 - 2)
    first, second = pruning.identifiers["a-options"], pruning.identifiers["b-options"]
    assert (first[0], second[0]) == ("a", "b")
    assert first[1:] != second[1:]


def test_vision_chunks_have_the_clients_modality() -> None:
    chunks = [{"type": "image"}, {"type": "video_chunk"}, {"type": "image"}]
    given: dict[str, list[Any]] = {"vision_chunk": chunks, "audio": [None]}
    assert client_modalities(given) == {"vision_chunk": ["image", "video", "image"], "audio": ["audio"]}
    assert client_modalities({"image": [None, 1], "video": []}) == {"image": ["image"] * 2, "video": []}


@pytest.mark.parametrize(
    ("limits", "modality"),
    [({"vision_chunk": 9}, "vision_chunk"), ({"image": 1, "video": 1}, "image"), ({"image": 0, "video": 1}, "video")],
)
def test_picture_becomes_mm_data_that_the_model_takes(limits: dict[str, int], modality: str) -> None:
    picture = Image.new("RGB", (6, 4))
    ((found, (item,)),) = as_mm_data(picture, limits).items()
    assert found == modality
    if modality == "video":
        item = Image.fromarray(item[0][3])
    assert (item["image"] if modality == "vision_chunk" else item).size == (6, 4)


def test_vllm_never_sees_our_items() -> None:
    found = items("a")
    assert split({"eadaprune": found, "do_resize": False}) == (found, {"do_resize": False})
    assert split({"do_resize": False}) == (None, {"do_resize": False})
