"""What vLLM's renderers take along, and what is noted of what they make."""

from collections.abc import Iterable, Mapping
from typing import Any

from eadaprune_vllm.core.options import KEY
from eadaprune_vllm.core.report import Pruning
from eadaprune_vllm.core.server_options import ServerOptions
from eadaprune_vllm.errors import InvalidOptionsError
from eadaprune_vllm.frontend.context import current
from eadaprune_vllm.frontend.request_options import Choices, choose, option_sources


def chat_extras(renderer: Any, messages: list[Any], prompt_extras: Mapping[str, Any] | None) -> dict[str, Any]:
    """What vLLM's ``renderer`` takes along with a chat prompt, with the options of all that is pruned resolved."""
    extras = dict(prompt_extras or {})
    kwargs = dict(extras.get("mm_processor_kwargs") or {})
    processor = renderer.mm_processor
    with processor.front_end.refusals():
        context = current()
        sources = option_sources(context, kwargs)
        kwargs[KEY] = choose(processor.server_options, sources, messages, context.item_counts)
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
        with renderer.mm_processor.front_end.refusals():
            raise InvalidOptionsError(f"{KEY} does nothing here: this request takes no images or videos", KEY)
