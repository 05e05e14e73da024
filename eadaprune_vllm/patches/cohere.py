"""``/v2/embed``: pruning options and ``detail`` of its images, which vLLM's models of that API would drop."""

from typing import Any

from eadaprune_vllm.core.options import KEY
from eadaprune_vllm.patching import wrap


def install() -> None:
    from vllm.entrypoints.pooling.embed import protocol

    protocol.CohereEmbedContent.model_config["extra"] = "allow"
    for name in ("Content", "Input", "Request"):
        getattr(protocol, f"CohereEmbed{name}").model_rebuild(force=True)

    @wrap("vllm.entrypoints.pooling.embed.io_processor:EmbedIOProcessor._mixed_input_to_messages")
    def mixed_input_to_messages(original: Any, inp: Any, **kwargs: Any) -> Any:
        messages = original(inp, **kwargs)
        for content, part in zip(inp.content, messages[-1]["content"], strict=True):
            fields = {**(content.image_url or {}), **(content.model_extra or {})}
            part.update({name: fields[name] for name in (KEY, "detail") if name in fields})
        return messages
