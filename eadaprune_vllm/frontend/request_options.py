"""From what a request says to the options of each of its images and videos."""

from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import Any

from eadaprune_vllm.core.options import KEY, MODALITIES, PruneOptions
from eadaprune_vllm.core.server_options import Choice, OptionSource, ServerOptions
from eadaprune_vllm.errors import InvalidOptionsError
from eadaprune_vllm.frontend.context import RequestContext

HEADER = "X-EAdaPrune-Energy"
# vLLM's content parts that are of a modality: by type, or by key where the type is missing or a uuid is given.
_TYPES = {
    "image_url": "image",
    "input_image": "image",
    "image_pil": "image",
    "image_embeds": "image",
    "image": "image",
    "video_url": "video",
    "video_embeds": "video",
}
_KEYS = ("image_url", "image_pil", "image_embeds", "video_embeds", "video_url")


class Choices(dict[str, tuple[Choice, ...]]):
    """What was chosen for each image and each video of a prompt, by modality, all modalities present."""

    def along(self, modalities: Iterable[str]) -> Iterator[Choice]:
        """Those for items of these modalities, in their order. What is neither image nor video is not ours to prune."""
        left = {modality: iter(items) for modality, items in self.items()}
        return (next(left.get(modality, _whole)) for modality in modalities)


_whole = repeat(Choice(PruneOptions(enabled=False)))


def option_sources(context: RequestContext, processor_kwargs: object) -> list[OptionSource]:
    """What a request says about all of its images and videos, in order of precedence, the weakest first.

    Args:
        context: the request's context.
        processor_kwargs: ``mm_processor_kwargs`` of the request; our key in it is the offline way to say the same.
    """
    sources = []
    if context.header is not None:
        sources.append(OptionSource(HEADER, {"energy": _number(context.header)}))
    if isinstance(processor_kwargs, dict):
        sources.append(OptionSource(f"mm_processor_kwargs.{KEY}", processor_kwargs.get(KEY)))
    sources.append(OptionSource(KEY, context.options))
    return sources


def choose(
    server: ServerOptions, sources: list[OptionSource], messages: list[Any], item_counts: dict[str, int]
) -> Choices:
    """What is chosen for each image and video in ``messages``, in the order in which vLLM numbers them.

    Args:
        server: the server's options.
        sources: what the request says about all of them.
        messages: chat messages; content that is a one-shot iterator is replaced by a list.
        item_counts: how many of each modality came before, for error messages; those of ``messages`` are added.

    Raises:
        InvalidOptionsError: naming item, field, value and allowed range.
    """
    server.resolve(*sources)  # also where there is no image
    parts = list(item_parts(messages))
    reject_misplaced(messages)
    answers = [
        n for n, message in enumerate(messages) if isinstance(message, dict) and message.get("role") == "assistant"
    ]
    previous = len(list(item_parts(messages[: max(answers, default=0)])))
    chosen: dict[str, list[Choice]] = {modality: [] for modality in MODALITIES}
    for number, (modality, part) in enumerate(parts):
        # OpenAI's detail is in image_url of chat completions, and on the part itself of responses.
        url = part.get("image_url")
        details = [place.get("detail") for place in (url, part) if isinstance(place, dict)]
        detail = next((detail for detail in details if detail is not None), "auto")
        where = f"{modality}s[{item_counts[modality]}]"
        preset = server.preset(detail, f"{where}.detail")
        own = OptionSource(f"{where}.{KEY}", part.get(KEY))
        chosen[modality].append(server.choose(*sources, preset, own, from_previous_turn=number < previous))
        item_counts[modality] += 1
    return Choices({modality: tuple(items) for modality, items in chosen.items()})


def item_parts(messages: list[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The content parts that are images or videos, after their modality, in the order in which vLLM numbers them."""
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if content is None or isinstance(content, str):
            continue
        if not isinstance(content, list):
            content = message["content"] = list(content)
        for part in content:
            if modality := modality_of(part):
                yield modality, part


def option_fields(value: object) -> Iterator[dict[str, Any]]:
    """The objects anywhere in a JSON value that have our field."""
    stack = [value]
    while stack:
        match stack.pop():
            case dict() as place:
                if place.get(KEY) is not None:
                    yield place
                stack.extend(place.values())
            case list() as places:
                stack.extend(places)


def reject_misplaced(messages: object) -> None:
    """Raises:
    InvalidOptionsError: if options are given where they do nothing.
    """
    if not all(map(modality_of, option_fields(messages))):
        raise InvalidOptionsError(
            f"{KEY} belongs to the request, or to a content part that is an image or a video", KEY
        )


def modality_of(part: object) -> str | None:
    """What vLLM, or its Anthropic API, takes a content part for, if that can be pruned."""
    if not isinstance(part, dict):
        return None
    kind = part.get("type")
    if kind is None or part.get("uuid") is not None:
        kind = next((key for key in _KEYS if key in part), None)
    return _TYPES.get(kind) if isinstance(kind, str) else None


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
