"""vLLM's input processor: a request is counted here, after vLLM's own checks, and its items get their identifiers."""

from dataclasses import replace
from typing import Any

from eadaprune_vllm.core.options import KEY
from eadaprune_vllm.engine.model import KEPT
from eadaprune_vllm.frontend.items import digest
from eadaprune_vllm.patching import wrap

_LOST = "a beam search with a cached image may fail if the engine decided about this image again"


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
        if prompt[KEY].reports and input_processor.vllm_config.observability_config.otlp_traces_endpoint:
            from eadaprune_vllm.frontend.tracing import trace_pruning  # vLLM checks that OpenTelemetry is installed

            request.trace_headers = trace_pruning(request.trace_headers, prompt[KEY])
        return request

    @wrap("vllm.entrypoints.generate.beam_search.utils:BeamSearchSequence.get_prompt", optional=_LOST)
    def get_prompt(original: Any, beam: Any) -> Any:
        """Each step of each beam is a new request with the same items. It gets the identifiers, but no reports, which
        would be counted again."""
        prompt = original(beam)
        if KEY in beam.orig_prompt:
            prompt[KEY] = replace(beam.orig_prompt[KEY], reports={}, timings=())
        return prompt


def _identify(features: Any) -> None:
    """Give items that were rendered before, possibly by another server, identifiers of the tokens kept there."""
    for feature in features:
        name = feature.modality + KEPT
        if feature.data is not None and name in feature.data:
            feature.identifier += digest(feature.data[name].data)
