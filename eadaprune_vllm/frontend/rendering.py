"""What happens before and after vLLM renders: options are resolved, and reports are collected."""

from collections.abc import Iterable, Mapping
from typing import Any

from eadaprune_vllm.core.options import KEY
from eadaprune_vllm.core.report import Pruning
from eadaprune_vllm.core.server_options import ServerOptions
from eadaprune_vllm.errors import InvalidOptionsError
from eadaprune_vllm.frontend.context import current
from eadaprune_vllm.frontend.request_options import Choices, choose, option_sources


def chat_extras(renderer: Any, messages: list[Any], prompt_extras: Mapping[str, Any] | None) -> dict[str, Any]:
    """vLLM's prompt extras of a chat, with the resolved options of its images and videos."""
    extras = dict(prompt_extras or {})
    kwargs = dict(extras.get("mm_processor_kwargs") or {})
    processor = renderer.mm_processor
    with processor.front_end.refusals():
        context = current()
        sources = option_sources(context, kwargs)
        kwargs[KEY] = choose(processor.server_options, sources, messages, context.item_counts)
    return extras | {"mm_processor_kwargs": kwargs}


def joined(renderer: Any, chats: Iterable[tuple[list[Any], list[Any]]]) -> tuple[list[Any], list[Any]]:
    """Join the conversations and engine inputs of chats that were rendered one by one, and collect their reports."""
    conversations: list[Any] = []
    prompts: list[Any] = []
    for chat in chats:
        conversations += chat[0]
        prompts += chat[1]
    collect_reports(renderer, prompts)
    return conversations, prompts


def collect_reports(renderer: Any, prompts: Iterable[Any]) -> None:
    """Add the reports of these engine inputs to the request's context."""
    options = renderer.mm_processor.server_options
    if options.report:
        current().prunings.extend(redacted(options, prompt[KEY]) for prompt in prompts if KEY in prompt)


def redacted(server: ServerOptions, pruning: Pruning) -> Pruning:
    """The part of it that clients may see."""
    return pruning if server.report_cached else pruning.without_cache()


def refuse_options(renderer: Any, prompts: Iterable[Any], prompt_extras: Mapping[str, Any] | None) -> None:
    """Raises:
    VLLMValidationError: if a request without images or videos has pruning options.
    """
    kwargs = (prompt_extras or {}).get("mm_processor_kwargs") or {}
    if isinstance(kwargs.get(KEY), Choices):  # resolved options of another prompt of the same request
        return
    given = current().options is not None or KEY in kwargs
    if given and not any(isinstance(prompt, dict) and prompt.get("multi_modal_data") for prompt in prompts):
        with renderer.mm_processor.front_end.refusals():
            raise InvalidOptionsError(f"{KEY} does nothing here: this request takes no images or videos", KEY)
