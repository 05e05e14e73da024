"""From the fields of a request to the options of each of its images and videos."""

from collections.abc import Iterable, Iterator
from itertools import repeat
from typing import Any

from eadaprune_vllm.core.options import KEY, MODALITIES, PruneOptions
from eadaprune_vllm.core.server_options import Choice, OptionSource, ServerOptions
from eadaprune_vllm.errors import InvalidOptionsError
from eadaprune_vllm.frontend.context import RequestContext

HEADER = "X-EAdaPrune-Energy"
# The modality of vLLM's content parts: by type, or by key if there is no type or there is a uuid.
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
    """The options of each image and each video of a prompt, by modality. Has an entry for every modality."""

    def for_items(self, modalities: Iterable[str]) -> Iterator[Choice]:
        """The options of items of these modalities, in this order. Other modalities, such as audio, are not pruned."""
        remaining = {modality: iter(choices) for modality, choices in self.items()}
        return (next(remaining.get(modality, _unpruned)) for modality in modalities)


_unpruned = repeat(Choice(PruneOptions(enabled=False)))


def option_sources(context: RequestContext, processor_kwargs: object) -> list[OptionSource]:
    """The options of a request that apply to all of its images and videos, in ascending precedence.

    Args:
        context: of the request.
        processor_kwargs: ``mm_processor_kwargs`` of the request, which may have the options too, as offline.
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
    """The options of each image and video in ``messages``, in vLLM's order.

    Args:
        server: the server's options.
        sources: options for all of them.
        messages: chat messages; content that is a one-shot iterator is replaced by a list.
        item_counts: items of each modality before these, for error messages; those of ``messages`` are added.

    Raises:
        InvalidOptionsError: naming item, field, value and allowed range.
    """
    server.resolve(*sources)  # validates them even if there are no images
    parts = list(item_parts(messages))
    reject_misplaced(messages)
    assistant_turns = [
        n for n, message in enumerate(messages) if isinstance(message, dict) and message.get("role") == "assistant"
    ]
    previous = len(list(item_parts(messages[: max(assistant_turns, default=0)])))
    chosen: dict[str, list[Choice]] = {modality: [] for modality in MODALITIES}
    for number, (modality, part) in enumerate(parts):
        # OpenAI's detail is in image_url in chat completions, and in the part itself in responses.
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
    """Modality and content part of each image and video, in vLLM's order."""
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
    """All objects in a JSON value, at any depth, that have the field ``eadaprune``."""
    stack = [value]
    while stack:
        match stack.pop():
            case dict() as obj:
                if obj.get(KEY) is not None:
                    yield obj
                stack.extend(obj.values())
            case list() as array:
                stack.extend(array)


def reject_misplaced(messages: object) -> None:
    """Raises:
    InvalidOptionsError: if there are options in a place where they would be ignored.
    """
    if not all(map(modality_of, option_fields(messages))):
        raise InvalidOptionsError(
            f"{KEY} belongs to the request, or to a content part that is an image or a video", KEY
        )


def reject_extra_body(body: dict[str, Any]) -> None:
    """Raises:
    InvalidOptionsError: if there are options in ``extra_body``, an argument of SDKs, which servers never see.
    """
    if any(option_fields(body.get("extra_body"))):
        raise InvalidOptionsError(
            f"{KEY} does nothing in extra_body, which is an argument of SDKs; in JSON it is a field of the body itself",
            "extra_body",
        )


def modality_of(part: object) -> str | None:
    """The modality of a content part of vLLM's OpenAI or Anthropic API, if it can be pruned."""
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
