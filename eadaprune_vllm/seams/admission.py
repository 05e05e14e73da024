"""Admission: a request counts once it has passed vLLM's own checks and is sent to the engine, where its images are
known by what is kept of them."""

from typing import Any

from eadaprune_vllm.models.items import digest
from eadaprune_vllm.models.pruned import KEPT
from eadaprune_vllm.options import KEY
from eadaprune_vllm.seams.wrap import wrap


def install() -> None:
    @wrap("vllm.v1.engine.input_processor:InputProcessor.process_inputs")
    def process_inputs(
        original: Any, input_processor: Any, request_id: str, prompt: Any, *args: Any, **kwargs: Any
    ) -> Any:
        request = original(input_processor, request_id, prompt, *args, **kwargs)
        if not (isinstance(prompt, dict) and KEY in prompt):
            _identify(request.mm_features or ())
            return request
        for feature in request.mm_features:
            feature.identifier = prompt[KEY].identifiers[feature.mm_hash]
        input_processor.renderer.mm_processor.front_end.admit(prompt[KEY])
        if input_processor.vllm_config.observability_config.otlp_traces_endpoint:
            from eadaprune_vllm.tracing import trace_pruning  # vLLM checks that OpenTelemetry is installed

            request.trace_headers = trace_pruning(request.trace_headers, prompt[KEY])
        return request


def _identify(features: Any) -> None:
    """What was rendered before, maybe by another server, is known by what was kept of it there."""
    for feature in features:
        name = feature.modality + KEPT
        if feature.data is not None and name in feature.data:
            feature.identifier += digest(feature.data[name].data)
