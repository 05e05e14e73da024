"""``/v1/messages``: pruning options of its images, which vLLM's models of that API would drop."""

from typing import Any

from eadaprune_vllm.core.options import KEY
from eadaprune_vllm.frontend.context import RequestContext, request_context
from eadaprune_vllm.patching import wrap

_SERVING = "vllm.entrypoints.anthropic.serving"


def install() -> None:
    from vllm.entrypoints.anthropic import protocol
    from vllm.exceptions import VLLMValidationError

    protocol.AnthropicContentBlock.model_config["extra"] = "allow"
    for name in ("ContentBlock", "Message", "MessagesRequest", "CountTokensRequest"):
        getattr(protocol, f"Anthropic{name}").model_rebuild(force=True)

    @wrap(f"{_SERVING}:AnthropicServingMessages._convert_block")
    def convert_block(
        original: Any,
        cls: Any,
        block: Any,
        role: str,
        content_parts: Any,
        tool_calls: Any,
        reasoning_parts: Any,
        openai_messages: Any,
    ) -> None:
        parts, messages = len(content_parts), len(openai_messages)
        original(cls, block, role, content_parts, tool_calls, reasoning_parts, openai_messages)
        # A block is one part of this message. The images in a tool result become a separate message.
        blocks = block.content if isinstance(block.content, list) else []
        sources = (
            [block.model_extra or {}] if block.type == "image" else [b for b in blocks if b.get("type") == "image"]
        )
        if not any(KEY in source for source in sources):
            return
        added = [*content_parts[parts:], *(part for m in openai_messages[messages:] for part in m["content"])]
        images = [part for part in added if isinstance(part, dict) and part["type"] == "image_url"]
        if len(images) != len(sources):
            raise VLLMValidationError(f"{KEY} is given for an image without data", parameter=KEY)
        for image, source in zip(images, sources, strict=True):
            if KEY in source:
                image[KEY] = source[KEY]

    # vLLM renders a prompt of its own here during the client's request, and caches whether that failed.
    @wrap(
        f"{_SERVING}:DisabledThinkingEffortResolver._render_probe_prompt",
        optional="pruning options of a /v1/messages request that disables thinking may fail vLLM's probe of a template",
    )
    async def render_probe_prompt(original: Any, resolver: Any, effort: Any) -> Any:
        with request_context(RequestContext()):
            return await original(resolver, effort)
