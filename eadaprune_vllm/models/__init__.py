"""The supported architectures: what vLLM calls them -> our class in their place."""

ARCHITECTURES = {
    "LlavaForConditionalGeneration": "eadaprune_vllm.models.llava:PrunedLlavaForConditionalGeneration",
}
