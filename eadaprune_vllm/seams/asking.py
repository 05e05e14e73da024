"""The renderer asks the engine before vLLM processes images and videos, so that nothing waits on its one thread."""

from typing import Any

from eadaprune_vllm.errors import StartupError
from eadaprune_vllm.models.items import Items
from eadaprune_vllm.options import KEY


def ask_first(renderer: Any) -> None:
    """Have a renderer of vLLM's ask. It applies its processor on one thread, where the order of processing is that of
    sending; asking is between two turns there.

    Raises:
        StartupError: if it renders in another way.
    """
    front_end = renderer.mm_processor.front_end
    try:
        process, process_async = renderer._process_multimodal, renderer._process_multimodal_async
    except AttributeError as error:
        raise StartupError(f"this vLLM's renderer is not of the kind known: {error}") from None

    def and_wait(*args: Any, mm_processor_kwargs: Any, **kwargs: Any) -> Any:
        given = _as_request(mm_processor_kwargs)
        while isinstance(result := process(*args, mm_processor_kwargs=given, **kwargs), Items):
            front_end.ask_and_wait(result.undecided())
            given[KEY] = result
        return result

    async def in_turn(*args: Any, mm_processor_kwargs: Any, **kwargs: Any) -> Any:
        given = _as_request(mm_processor_kwargs)
        while isinstance(result := await process_async(*args, mm_processor_kwargs=given, **kwargs), Items):
            await front_end.ask(result.undecided())
            given[KEY] = result
        return result

    renderer._process_multimodal, renderer._process_multimodal_async = and_wait, in_turn


def _as_request(mm_processor_kwargs: Any) -> dict[str, Any]:
    """The processor's options of a request, with ours, without which it is warm-up to the processor."""
    given = dict(mm_processor_kwargs or {})
    return given | {KEY: {} if given.get(KEY) is None else given[KEY]}
