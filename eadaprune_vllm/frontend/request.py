"""From what a request says to the options of each of its images and videos, whatever endpoint it came to."""

from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, TypeVar

from vllm.exceptions import VLLMValidationError

from eadaprune_vllm.core.options import KEY, MODALITIES, PruneOptions
from eadaprune_vllm.core.report import Pruning, Report
from eadaprune_vllm.core.server_options import Choice, OptionSource, ServerOptions
from eadaprune_vllm.errors import InvalidOptionsError
from eadaprune_vllm.frontend.front_end import FrontEnd
from eadaprune_vllm.frontend.metrics import Source

T = TypeVar("T")
HEADER = "X-EAdaPrune-Energy"


@dataclass(frozen=True)
class Endpoint:
    """One of vLLM's routes that take images and videos, and with them the field. All others refuse it.

    Attributes:
        fields: of its bodies, that hold images and videos.
        reports: whether its answers carry the report. What is rendered is sent on as another request, so that its body
            stays as it is.
    """

    fields: tuple[str, ...] = ("messages",)
    reports: bool = True


_CHATS, _RERANK = ("messages", "input"), ("query", "documents")
_SCORE = ("queries", "documents", "items", "data_1", "data_2", "text_1", "text_2")
ENDPOINTS = {
    "/v1/chat/completions": Endpoint(),
    "/v1/chat/completions/batch": Endpoint(),
    "/v1/chat/completions/render": Endpoint(reports=False),
    "/v1/responses": Endpoint(("input",)),
    "/v1/responses/render": Endpoint(("input",), reports=False),
    "/v1/messages": Endpoint(("messages", "system")),
    "/v1/messages/count_tokens": Endpoint(("messages", "system")),
    "/v1/messages/render": Endpoint(("messages", "system"), reports=False),
    "/v1/embeddings": Endpoint(_CHATS),
    "/v2/embed": Endpoint(("inputs", "images")),
    "/pooling": Endpoint(),
    "/classify": Endpoint(),
    "/score": Endpoint(_SCORE),
    "/v1/score": Endpoint(_SCORE),
    "/rerank": Endpoint(_RERANK),
    "/v1/rerank": Endpoint(_RERANK),
    "/v2/rerank": Endpoint(_RERANK),
    "/v1/systemone": Endpoint(("images", "videos")),
    "/tokenize": Endpoint(),
    "/invocations": Endpoint((*_CHATS, *_RERANK, *_SCORE)),
}
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
        left = {modality: iter(of_each) for modality, of_each in self.items()}
        return (next(left.get(modality, _whole)) for modality in modalities)


_whole = repeat(Choice(PruneOptions(enabled=False)))


@dataclass
class RequestContext:
    """What a request's endpoint says and vLLM's own request objects do not carry, and what the answer will report.

    Attributes:
        header: value of the header ``X-EAdaPrune-Energy``.
        options: the request's field ``eadaprune``.
        met: how many images and videos were met so far; a batch has several prompts.
        prunings: filled in where the request is rendered.
    """

    header: str | None = None
    options: object = None
    met: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MODALITIES, 0))
    prunings: list[Pruning] = field(default_factory=list)

    def report(self) -> Report | None:
        """What to tell the client: None if there was nothing to prune, or the server does not tell."""
        return Report.of(self.prunings) if self.prunings else None


_current: ContextVar[RequestContext] = ContextVar(KEY)


@contextmanager
def request_context(context: RequestContext) -> Iterator[RequestContext]:
    """While open, code that this task calls or starts finds ``context``."""
    token = _current.set(context)
    try:
        yield context
    finally:
        _current.reset(token)


async def in_context(chunks: AsyncIterator[T], context: RequestContext) -> AsyncGenerator[T]:
    """The chunks of a stream, whose code finds ``context`` also after the route's handler has returned. Whoever takes
    the chunks does not: what a generator sets at a ``yield`` is set for its consumer."""
    while True:
        with request_context(context):
            try:
                chunk = await anext(chunks)
            except StopAsyncIteration:
                return
        yield chunk


def current() -> RequestContext:
    """The context of the request being served; an empty one outside of requests."""
    return _current.get(None) or RequestContext()


def option_sources(context: RequestContext, processor_kwargs: object) -> list[OptionSource]:
    """What a request says about all of its images and videos, in order of precedence, the weakest first.

    Args:
        context: the request's context.
        processor_kwargs: ``mm_processor_kwargs`` of the request; our key in it is the offline way to say the same.
    """
    layers = []
    if context.header is not None:
        layers.append(OptionSource(HEADER, {"energy": _number(context.header)}))
    if isinstance(processor_kwargs, dict):
        layers.append(OptionSource(f"mm_processor_kwargs.{KEY}", processor_kwargs.get(KEY)))
    layers.append(OptionSource(KEY, context.options))
    return layers


def choose(server: ServerOptions, layers: list[OptionSource], messages: list[Any], met: dict[str, int]) -> Choices:
    """What is chosen for each image and video in ``messages``, in the order in which vLLM numbers them.

    Args:
        server: the server's options.
        layers: what the request says about all of them.
        messages: chat messages; content that is a one-shot iterator is replaced by a list.
        met: how many of each modality came before, for error messages; those of ``messages`` are added.

    Raises:
        InvalidOptionsError: naming item, field, value and allowed range.
    """
    server.resolve(*layers)  # also where there is no image
    parts = list(item_parts(messages))
    reject_misplaced(messages)
    answers = [
        n for n, message in enumerate(messages) if isinstance(message, dict) and message.get("role") == "assistant"
    ]
    answered = len(list(item_parts(messages[: max(answers, default=0)])))
    chosen: dict[str, list[Choice]] = {modality: [] for modality in MODALITIES}
    for number, (modality, part) in enumerate(parts):
        # OpenAI's detail is in image_url of chat completions, and on the part itself of responses.
        url = part.get("image_url")
        details = [place.get("detail") for place in (url, part) if isinstance(place, dict)]
        detail = next((detail for detail in details if detail is not None), "auto")
        where = f"{modality}s[{met[modality]}]"
        preset = server.preset(detail, f"{where}.detail")
        own = OptionSource(f"{where}.{KEY}", part.get(KEY))
        chosen[modality].append(server.choose(*layers, preset, own, answered=number < answered))
        met[modality] += 1
    return Choices({modality: tuple(of_each) for modality, of_each in chosen.items()})


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


def chat_extras(renderer: Any, messages: list[Any], prompt_extras: Mapping[str, Any] | None) -> dict[str, Any]:
    """What vLLM's ``renderer`` takes along with a chat prompt, with the options of all that is pruned resolved."""
    extras = dict(prompt_extras or {})
    kwargs = dict(extras.get("mm_processor_kwargs") or {})
    processor = renderer.mm_processor
    with count_refusals(processor.front_end):
        context = current()
        layers = option_sources(context, kwargs)
        kwargs[KEY] = choose(processor.server_options, layers, messages, context.met)
    return extras | {"mm_processor_kwargs": kwargs}


def rendered(renderer: Any, chats: Iterable[tuple[list[Any], list[Any]]]) -> tuple[list[Any], list[Any]]:
    """Conversations and engine inputs of all ``chats``; what was pruned is noted for the answer."""
    conversations: list[Any] = []
    prompts: list[Any] = []
    for chat in chats:
        conversations += chat[0]
        prompts += chat[1]
    note(renderer, prompts)
    return conversations, prompts


def note(renderer: Any, prompts: Iterable[Any]) -> None:
    """What was pruned of these engine inputs is told with the answer."""
    options = renderer.mm_processor.server_options
    if options.report:
        current().prunings.extend(redacted(options, prompt[KEY]) for prompt in prompts if KEY in prompt)


def redacted(server: ServerOptions, pruning: Pruning) -> Pruning:
    """What of it a client is told."""
    return pruning if server.report_cached else pruning.without_cache()


def refuse_options(renderer: Any, prompts: Iterable[Any], prompt_extras: Mapping[str, Any] | None) -> None:
    """Raises:
    VLLMValidationError: if a request without images or videos says how to prune them.
    """
    kwargs = (prompt_extras or {}).get("mm_processor_kwargs") or {}
    if isinstance(kwargs.get(KEY), Choices):  # resolved: of others of the same request
        return
    given = current().options is not None or KEY in kwargs
    if given and not any(isinstance(prompt, dict) and prompt.get("multi_modal_data") for prompt in prompts):
        with count_refusals(renderer.mm_processor.front_end):
            raise InvalidOptionsError(f"{KEY} does nothing here: this request takes no images or videos", KEY)


@contextmanager
def count_refusals(front_end: FrontEnd, source: Source = "request") -> Iterator[None]:
    """While open, bad options are counted and become vLLM's 400."""
    try:
        yield
    except InvalidOptionsError as error:
        front_end.reject("options", source)
        raise VLLMValidationError(str(error), parameter=error.field) from None


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
