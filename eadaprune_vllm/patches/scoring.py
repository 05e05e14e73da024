"""``/score``, ``/rerank`` and ``LLM.score``: pruning options of images and videos in queries and documents."""

from collections.abc import Iterator
from typing import Any

from eadaprune_vllm.frontend.rendering import chat_extras
from eadaprune_vllm.patching import wrap

_PROCESSORS = "vllm.entrypoints.pooling.scoring.io_processor"


def install() -> None:
    # In a bi-encoder each query and each document is a prompt; all queries come before all documents.
    @wrap(f"{_PROCESSORS}:BiEncoderIOProcessor.get_request_factory_online")
    def each_online(original: Any, processor: Any, ctx: Any) -> list[Any]:
        data = processor.valid_inputs_online(ctx.request)
        return list(_each(processor, original(processor, ctx), data))

    @wrap(f"{_PROCESSORS}:BiEncoderIOProcessor.get_request_factory_offline")
    def each_offline(original: Any, processor: Any, ctx: Any) -> tuple[Any, int]:
        factory, count = original(processor, ctx)
        return lambda: _each(processor, factory(), ctx.scoring_data), count

    # In a cross-encoder a query and a document are one prompt.
    @wrap(f"{_PROCESSORS}:CrossEncoderIOProcessor.get_request_factory_online")
    def pairs_online(original: Any, processor: Any, ctx: Any) -> list[Any]:
        return list(_pairs(processor, original(processor, ctx)))

    @wrap(f"{_PROCESSORS}:CrossEncoderIOProcessor.get_request_factory_offline")
    def pairs_offline(original: Any, processor: Any, ctx: Any) -> tuple[Any, int]:
        factory, count = original(processor, ctx)
        return lambda: _pairs(processor, factory()), count


def _each(processor: Any, prompts: Any, data: Any) -> Iterator[Any]:
    return (_resolve(processor, *each) for each in zip(prompts, data.data_1 + data.data_2, strict=True))


def _pairs(processor: Any, pairs: Any) -> Iterator[Any]:
    return (_resolve(processor, pair, pair["data_1"], pair["data_2"]) for pair in pairs)


def _resolve(processor: Any, prompt: Any, *contents: Any) -> Any:
    """The prompt with the resolved options of the images and videos in ``contents``."""
    messages = [{"content": content} for content in contents]
    extras = chat_extras(processor.renderer, messages, prompt["prompt_extras"])
    return prompt | {"prompt_extras": extras}
