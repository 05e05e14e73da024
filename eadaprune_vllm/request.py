"""From what a request says to the options of each of its images, whatever door it came through."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from vllm.exceptions import VLLMValidationError

from eadaprune_vllm.errors import InvalidOptionsError
from eadaprune_vllm.front_end import FrontEnd
from eadaprune_vllm.options import KEY, Layer, PruneOptions, ServerOptions
from eadaprune_vllm.report import Pruning, Report

HEADER = "X-EAdaPrune-Energy"
# vLLM's content parts that are images: by type, or by key where the type is missing or a uuid is given.
_IMAGE_TYPES = ("image_url", "input_image", "image_pil", "image_embeds")
_IMAGE_KEYS = ("image_url", "image_pil", "image_embeds")


@dataclass
class RequestContext:
    """What a request's door says and vLLM's own request objects do not carry, and what the answer will report.

    Attributes:
        header: value of the header ``X-EAdaPrune-Energy``.
        options: the request's field ``eadaprune``.
        images: how many images were met so far; a batch has several prompts.
        prunings: filled in where the request is rendered.
    """

    header: str | None = None
    options: object = None
    images: int = 0
    prunings: list[Pruning] = field(default_factory=list)

    def report(self) -> Report | None:
        """What to tell the client: None if there were no images, or the server does not tell."""
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


def current() -> RequestContext:
    """The context of the request being served; an empty one outside of requests."""
    return _current.get(None) or RequestContext()


def request_layers(context: RequestContext, processor_kwargs: object) -> list[Layer]:
    """What a request says about all of its images, in order of precedence, the weakest first.

    Args:
        context: the request's context.
        processor_kwargs: ``mm_processor_kwargs`` of the request; our key in it is the offline way to say the same.
    """
    layers = []
    if context.header is not None:
        layers.append(Layer(HEADER, {"energy": _number(context.header)}))
    if isinstance(processor_kwargs, dict):
        layers.append(Layer(f"mm_processor_kwargs.{KEY}", processor_kwargs.get(KEY)))
    layers.append(Layer(KEY, context.options))
    return layers


def image_options(
    server: ServerOptions, layers: list[Layer], messages: list[Any], first: int = 0
) -> tuple[PruneOptions, ...]:
    """The options of each image in ``messages``, in the order in which vLLM numbers them.

    Args:
        server: the server's options.
        layers: what the request says about all images.
        messages: chat messages; content that is a one-shot iterator is replaced by a list.
        first: number of the first image in error messages.

    Raises:
        InvalidOptionsError: naming image, field, value and allowed range.
    """
    server.resolve(*layers)  # also where there is no image
    options = []
    for number, part in enumerate(image_parts(messages), first):
        url = part.get("image_url")
        _refuse(url)
        # OpenAI's detail is in image_url of chat completions, and on the part itself of responses.
        detail = (url.get("detail") if isinstance(url, dict) else None) or part.get("detail") or "auto"
        where = f"images[{number}]"
        preset = server.preset(detail, f"{where}.detail")
        options.append(server.resolve(*layers, preset, Layer(f"{where}.{KEY}", part.get(KEY))))
    return tuple(options)


def image_parts(messages: list[Any]) -> Iterator[dict[str, Any]]:
    """The content parts that are images, in the order in which vLLM numbers them.

    Raises:
        InvalidOptionsError: if options are given where they do nothing.
    """
    for message in messages:
        _refuse(message)
        content = message.get("content") if isinstance(message, dict) else None
        if content is None or isinstance(content, str):
            continue
        if not isinstance(content, list):
            content = message["content"] = list(content)
        for part in content:
            if _is_image(part):
                yield part
            else:
                _refuse(part)


def chat_extras(renderer: Any, messages: list[Any], prompt_extras: Mapping[str, Any] | None) -> dict[str, Any]:
    """What vLLM's ``renderer`` takes along with a chat prompt, with the options of its images resolved."""
    extras = dict(prompt_extras or {})
    kwargs = dict(extras.get("mm_processor_kwargs") or {})
    processor = renderer.mm_processor
    with refusals(processor.front_end):
        context = current()
        layers = request_layers(context, kwargs)
        kwargs[KEY] = options = image_options(processor.server_options, layers, messages, first=context.images)
        context.images += len(options)
    return extras | {"mm_processor_kwargs": kwargs}


def rendered(renderer: Any, chats: Iterable[tuple[list[Any], list[Any]]]) -> tuple[list[Any], list[Any]]:
    """Conversations and engine inputs of all ``chats``; what became of their images is noted for the answer."""
    conversations: list[Any] = []
    prompts: list[Any] = []
    for chat in chats:
        conversations += chat[0]
        prompts += chat[1]
    if renderer.mm_processor.server_options.report:
        current().prunings.extend(prompt[KEY] for prompt in prompts if KEY in prompt)
    return conversations, prompts


def refuse_options(renderer: Any, prompt_extras: Mapping[str, Any] | None) -> None:
    """Raises:
    VLLMValidationError: if a request that takes no images says how to prune them.
    """
    kwargs = (prompt_extras or {}).get("mm_processor_kwargs") or {}
    if current().options is not None or KEY in kwargs:
        with refusals(renderer.mm_processor.front_end):
            raise InvalidOptionsError(f"{KEY} does nothing here: only chat messages take images", KEY)


@contextmanager
def refusals(front_end: FrontEnd) -> Iterator[None]:
    """While open, bad options are counted and become vLLM's 400."""
    try:
        yield
    except InvalidOptionsError as error:
        front_end.reject("options")
        raise VLLMValidationError(str(error), parameter=error.field) from None


def _refuse(place: object) -> None:
    """Options do nothing here."""
    if isinstance(place, dict) and KEY in place:
        raise InvalidOptionsError(f"{KEY} belongs to the request, or to a content part that is an image", KEY)


def _is_image(part: object) -> bool:
    if not isinstance(part, dict):
        return False
    kind = part.get("type")
    if kind is None or part.get("uuid") is not None:
        return any(key in part for key in _IMAGE_KEYS)
    return kind in _IMAGE_TYPES


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
