"""Decisions that travel between instances."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from vllm.exceptions import VLLMValidationError

from eadaprune_vllm.core.item_report import ItemReport
from eadaprune_vllm.core.layout import Layout, Newlines
from eadaprune_vllm.core.options import KEY
from eadaprune_vllm.core.transfer import TransferredItem
from eadaprune_vllm.frontend.transfer import EC_PARAMS, KV_PARAMS, Transfer

HASH = "ab" * 32


def report(total: int, kept: int) -> ItemReport:
    return ItemReport(
        visual_tokens=total,
        kept_tokens=kept,
        energy_threshold=0.9,
        energy_requested=0.9,
        spectral_energy=0.91,
        span_energy=None,
        selector="attention",
        cached=True,
    )


def decided(*placeholders: int, total: int = 20) -> TransferredItem:
    return TransferredItem.of(HASH, np.array(placeholders), report(total, len(placeholders)))


def transferred(*items: TransferredItem, **more: Any) -> dict[str, Any]:
    """``kv_transfer_params``, as JSON."""
    return {"do_remote_prefill": True, KEY: {"image": [item.model_dump(mode="json") for item in items]}, **more}


def of(kv_params: Any) -> Transfer | None:
    return Transfer.of({KV_PARAMS: kv_params})


def encoded(**items: TransferredItem) -> dict[str, Any]:
    """A body with ``ec_transfer_params``, as JSON."""
    entries = {name: {"item_indices": [0], KEY: item.model_dump(mode="json")} for name, item in items.items()}
    return {EC_PARAMS: entries}


@pytest.mark.parametrize("placeholders", [[0], [19], [0, 7, 8, 19], [*range(20)]])
def test_a_decision_survives_the_journey(placeholders: list[int]) -> None:
    there = of(transferred(decided(*placeholders)))
    assert there
    found = there.decision("image", 0, HASH, is_needed=True)
    assert found
    assert found.placeholders is not None
    assert found.placeholders.tolist() == placeholders
    assert found.report == report(20, len(placeholders)).model_copy(update={"cached": None})


def test_it_is_short() -> None:
    assert len(decided(*range(0, 576, 5), total=576).kept or "") == 96


def test_items_that_are_kept_without_a_decision() -> None:
    there = of(transferred(TransferredItem.of(HASH, None, report(20, 20))))
    assert there
    found = there.decision("image", 0, HASH, is_needed=True)
    assert found
    assert found.placeholders is None


@pytest.mark.parametrize("params", [None, {}, [], {"do_remote_decode": True}, {"do_remote_prefill": False}, "text"])
def test_requests_without_cache_of_another_instance(params: Any) -> None:
    assert of(params) is None


WRONG: list[tuple[Callable[[Any], object], str]] = [
    (lambda item: item.update(kept=None), "kept is null"),
    (lambda item: item.update(kept="!"), "kept"),
    (lambda item: item.update(kept=7), "valid string"),
    (lambda item: item.update(kept=""), "is not a bitmap of 20 placeholders"),
    (lambda item: item.update(kept="AAAA"), "kept has 0 placeholders"),
    (lambda item: item.update(kept="gAAB"), "is not a bitmap of 20 placeholders"),  # a bit behind the last
    (lambda item: item.update(kept="gAAAAA=="), "is not a bitmap of 20 placeholders"),
    (lambda item: item["report"].update(kept_tokens=3), "and the report 3"),
    (lambda item: item["report"].pop("selector"), "Field required"),
    (lambda item: item.pop("hash"), "Field required"),
    (lambda item: item.update(more=1), "Extra inputs are not permitted"),
]


@pytest.mark.parametrize(("change", "words"), WRONG)
def test_malformed_decisions_are_refused(change: Callable[[Any], object], words: str) -> None:
    params = transferred(decided(0, 5))
    change(params[KEY]["image"][0])
    with pytest.raises(VLLMValidationError, match=words):
        of(params)


def test_decisions_about_others_are_refused() -> None:
    there = of(transferred(decided(0, 5)))
    assert there
    with pytest.raises(VLLMValidationError, match=r"eadaprune\.image\.0 is about another image"):
        there.decision("image", 0, "cd" * 32, is_needed=False)
    with pytest.raises(VLLMValidationError, match="has no decision about image 1"):
        there.decision("image", 1, HASH, is_needed=True)
    assert there.decision("image", 1, HASH, is_needed=False) is None


def test_later_turns_bring_images_that_are_not_decided_about() -> None:
    """The first instance loads what the second has of the turns before."""
    params = transferred(decided(0, 5), do_remote_prefill=False, do_remote_decode=True, remote_block_ids=[1])
    there = of(params)
    assert there
    assert there.decision("image", 0, HASH, is_needed=True)
    assert there.decision("image", 1, HASH, is_needed=True) is None
    there.check({"image": [decided(0, 5), decided(0, 6)]}, 99)
    del params[KEY]
    nothing = of(params)
    assert nothing
    with pytest.raises(VLLMValidationError, match="has no decision about image 0"):
        nothing.decision("image", 0, HASH, is_needed=True)


def test_what_a_prompt_keeps_is_compared() -> None:
    there = of(transferred(decided(0, 5)))
    assert there
    there.check({"image": [decided(0, 5)]}, 99)
    with pytest.raises(VLLMValidationError, match="is not what this prompt keeps of the image"):
        there.check({"image": [decided(0, 6)]}, 99)
    with pytest.raises(VLLMValidationError, match="has 1 decisions, and the request 0 images"):
        there.check({}, 99)


def test_the_length_of_the_prompt_is_compared() -> None:
    there = of(transferred(decided(0, 5), remote_num_tokens=30))
    assert there
    there.check({"image": [decided(0, 5)]}, 30)
    with pytest.raises(VLLMValidationError, match="remote_num_tokens=30 is less than the 31 tokens"):
        there.check({"image": [decided(0, 5)]}, 31)


@pytest.mark.parametrize("params", [{}, {"x": 7}, {"ec_items": [{}]}, {"x": {"metadata": {}}}, [1], "text"])
def test_requests_whose_encoder_decided_nothing(params: Any) -> None:
    assert Transfer.of({EC_PARAMS: params}) is None


def test_decisions_of_an_encoder() -> None:
    other = "cd" * 32
    there = Transfer.of(encoded(a=decided(0, 5), b=TransferredItem.of(other, None, report(20, 20))))
    assert there
    assert there.decision("image", 7, HASH, is_needed=True) == decided(0, 5)
    assert there.decision("video", 0, other, is_needed=True) == TransferredItem.of(other, None, report(20, 20))
    assert there.decision("image", 0, "ef" * 32, is_needed=True) is None  # it is decided about here
    there.check({"image": [decided(0, 6)]}, 99)  # no KV cache is loaded


def test_different_decisions_of_an_encoder_about_one_image_are_not_used() -> None:
    there = Transfer.of(encoded(a=decided(0, 5), b=decided(0, 6), c=decided(0, 7)))
    assert there
    assert there.decision("image", 0, HASH, is_needed=True) is None


def test_malformed_decisions_of_an_encoder_are_refused() -> None:
    body = encoded(a=decided(0, 5))
    body[EC_PARAMS]["a"][KEY]["kept"] = "!"
    with pytest.raises(VLLMValidationError, match=r"ec_transfer_params\.eadaprune\.a\.kept"):
        Transfer.of(body)


def test_an_instance_that_prefills_what_another_encoded() -> None:
    body = encoded(a=decided(0, 5)) | {KV_PARAMS: {"do_remote_decode": True, "do_remote_prefill": False}}
    there = Transfer.of(body)
    assert there
    assert there.decision("image", 0, HASH, is_needed=True) == decided(0, 5)
    later = Transfer.of(body | {KV_PARAMS: transferred(decided(0, 6))})
    assert later
    assert later.decision("image", 0, HASH, is_needed=True) == decided(0, 6)  # as in the KV cache


def test_tokens_of_placeholders() -> None:
    """With newlines: those of lines that keep a token stay."""
    line = torch.tensor([0, 0, 1, 1])
    layout = Layout(
        torch.zeros(4, dtype=torch.int64), ((2, 2),), Newlines(torch.tensor([0, 0, 1, 0, 0, 1]).bool(), line)
    )
    for tokens in ([0], [1, 2], [3], [0, 1, 2, 3]):
        indices = torch.tensor(tokens)
        assert layout.indices(layout.placeholders(indices)).tolist() == tokens
    for wrong in ([0], [0, 5], [2], [0, 2, 5], [0, 2, 6]):
        with pytest.raises(ValueError, match="no tokens have these placeholders"):
            layout.indices(torch.tensor(wrong))
