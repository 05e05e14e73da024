"""From messages to the options of each image."""

import re
from typing import Any

import pytest

from eadaprune_vllm.core.options import PruneOptions
from eadaprune_vllm.core.server_options import Choice, ServerOptions
from eadaprune_vllm.errors import InvalidOptionsError
from eadaprune_vllm.frontend.context import RequestContext
from eadaprune_vllm.frontend.request_options import Choices, choose, option_sources

SERVER = ServerOptions(energy=0.9, detail_low={"energy": 0.5})


def image(**extra: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": "data:,"}, **extra}


def detail(level: str, **extra: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": "data:,", "detail": level}, **extra}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def energies(*messages: Any, header: str | None = None, options: object = None, kwargs: object = None) -> list[float]:
    context = RequestContext(header, options)
    chosen = choose(SERVER, option_sources(context, kwargs), list(messages), context.item_counts)
    return [choice.options.energy for choice in chosen["image"]]


def test_precedence_image_request_header_server() -> None:
    own = image(eadaprune={"energy": 0.6})
    kwargs = {"eadaprune": {"energy": 0.75}}
    assert energies(user(own, image())) == [0.6, 0.9]
    assert energies(user(own, image()), header="0.7") == [0.6, 0.7]
    assert energies(user(own, image()), header="0.7", kwargs=kwargs) == [0.6, 0.75]
    assert energies(user(own, image()), header="0.7", kwargs=kwargs, options={"energy": 0.8}) == [0.6, 0.8]
    # What one source leaves open comes from the next.
    assert energies(user(image(eadaprune={"min_tokens": 1})), header="0.7") == [0.7]
    assert energies(user(image(eadaprune={})), options={"min_tokens": 1}, header="0.7") == [0.7]


def test_detail_is_above_the_request_and_below_the_images_own_options() -> None:
    own = {"eadaprune": {"energy": 0.6}}
    assert energies(user(detail("low"), detail("high"), detail("auto"), detail("original"))) == [0.5, 1, 0.9, 1]
    assert energies(user(detail("low"), detail("auto")), options={"energy": 0.8}) == [0.5, 0.8]
    assert energies(user(detail("low", **own), detail("high", **own))) == [0.6, 0.6]
    part = {"type": "input_image", "image_url": "data:,", "detail": "low"}  # as /v1/responses has it
    assert energies(user(part)) == [0.5]


def test_images_are_numbered_through_all_messages_as_vllm_does() -> None:
    text = {"type": "text", "text": "and"}
    first = user(text, image(eadaprune={"energy": 0.1}), "plain", image(eadaprune={"energy": 0.2}))
    system = {"role": "system", "content": "be brief"}
    answer: dict[str, Any] = {"role": "assistant", "content": None}
    pil = {"type": "image_pil", "image_pil": object(), "eadaprune": {"energy": 0.3}}
    by_uuid = {"image_url": None, "uuid": "a", "eadaprune": {"energy": 0.4}}
    typed_by_uuid = {"type": "image_url", "image_url": None, "uuid": "b"}
    audio = {"type": "audio_url", "audio_url": {"url": "x"}}
    messages = [system, first, answer, user(pil, audio, by_uuid, typed_by_uuid)]
    assert energies(*messages) == [0.1, 0.2, 0.3, 0.4, 0.9]


def test_videos_are_numbered_by_themselves() -> None:
    video = {"type": "video_url", "video_url": {"url": "data:,"}}
    message = user(image(), video, video | {"eadaprune": {"energy": 0.3}}, image(eadaprune={"energy": 0.2}))
    context = RequestContext()
    chosen = choose(SERVER, [], [message], context.item_counts)
    assert [choice.options.energy for choice in chosen["image"]] == [0.9, 0.2]
    assert [choice.options.energy for choice in chosen["video"]] == [0.9, 0.3]
    assert context.item_counts == {"image": 2, "video": 2}
    with pytest.raises(InvalidOptionsError, match=re.escape("videos[3].eadaprune.energy=2 is not allowed")):
        choose(SERVER, [], [user(video, video | {"eadaprune": {"energy": 2}})], context.item_counts)


def test_content_that_can_be_read_once_is_still_there_afterwards() -> None:
    parts = [image(), image(eadaprune={"energy": 0.3})]
    message = {"role": "user", "content": iter(parts)}
    assert energies(message) == [0.9, 0.3]
    assert message["content"] == parts


@pytest.mark.parametrize(
    ("messages", "settings", "words", "field"),
    [
        ([user(image(), image(eadaprune={"energy": 2}))], {}, "=2 is not allowed", "images[1].eadaprune.energy"),
        ([user(image(eadaprune=0.9))], {}, "=0.9 is not an object", "images[0].eadaprune"),
        ([user(detail(""))], {}, "='' is not allowed; it must be one of auto", "images[0].detail"),
        ([user(detail("medium"))], {}, "='medium' is not allowed; it must be one of auto", "images[0].detail"),
        ([], {"options": {"energy": 0}}, "=0 is not allowed", "eadaprune.energy"),
        ([], {"header": "much"}, "='much' is not allowed; it must be a number", "X-EAdaPrune-Energy.energy"),
        ([], {"header": "nan"}, "=nan is not allowed; it must be a number", "X-EAdaPrune-Energy.energy"),
        ([], {"kwargs": {"eadaprune": {"x": 1}}}, "is not an option", "mm_processor_kwargs.eadaprune.x"),
        ([user({"type": "text", "text": "a", "eadaprune": {}})], {}, "belongs to the request, or to", "eadaprune"),
        ([user(image()) | {"eadaprune": {}}], {}, "belongs to the request, or to", "eadaprune"),
        ([user({"type": "image_url", "image_url": {"url": "", "eadaprune": {}}})], {}, "belongs to", "eadaprune"),
    ],
)
def test_unsupported_configurations_are_refused(
    messages: list[Any], settings: dict[str, Any], words: str, field: str
) -> None:
    with pytest.raises(InvalidOptionsError, match=re.escape(words)) as error:
        energies(*messages, **settings)
    assert error.value.field == field


def test_choices_are_paired_with_items() -> None:
    first, second, third = (Choice(PruneOptions(energy=energy)) for energy in (0.1, 0.2, 0.3))
    choices = Choices(image=(first, second), video=(third,))
    assert list(choices.for_items(["image", "video", "image"])) == [first, third, second]
    (none,) = choices.for_items(["audio"])
    assert not none.options.enabled
