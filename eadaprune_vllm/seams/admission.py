"""Admission: a request counts once it has passed vLLM's own checks and is sent to the engine, where its images are
known by what is kept of them."""

from typing import Any

from eadaprune_vllm.options import KEY
from eadaprune_vllm.seams.wrap import wrap


def install() -> None:
    @wrap("vllm.v1.engine.input_processor:InputProcessor.process_inputs")
    def process_inputs(
        original: Any, input_processor: Any, request_id: str, prompt: Any, *args: Any, **kwargs: Any
    ) -> Any:
        request = original(input_processor, request_id, prompt, *args, **kwargs)
        if isinstance(prompt, dict) and KEY in prompt:
            for feature in request.mm_features:
                feature.identifier = prompt[KEY].identifiers[feature.mm_hash]
            input_processor.renderer.mm_processor.front_end.admit(prompt[KEY])
            if input_processor.vllm_config.observability_config.otlp_traces_endpoint:
                from eadaprune_vllm.tracing import trace_pruning  # vLLM checks that OpenTelemetry is installed

                request.trace_headers = trace_pruning(request.trace_headers, prompt[KEY])
        return request
