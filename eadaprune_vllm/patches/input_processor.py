"""vLLM's input processor: a request is counted here, after vLLM's own checks, and its items get their identifiers."""

from dataclasses import replace
from typing import Any

from eadaprune_vllm.core.options import KEY
from eadaprune_vllm.core.report import Pruning
from eadaprune_vllm.engine.model import KEPT
from eadaprune_vllm.frontend.context import RequestContext, request_context
from eadaprune_vllm.frontend.items import digest
from eadaprune_vllm.frontend.transfer import EC_PARAMS, KV_PARAMS, Transfer
from eadaprune_vllm.patching import wrap

_LOST = "a beam search with a cached image may fail if the engine decided about this image again"


def install() -> None:
    @wrap("vllm.v1.engine.input_processor:InputProcessor.process_inputs")
    def process_inputs(
        original: Any, input_processor: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        transfer_params = getattr(params, "extra_args", None)
        with request_context(RequestContext(transfer_params=transfer_params)) as context:
            request = original(input_processor, request_id, prompt, params, *args, **kwargs)
        # ``original`` renders a raw prompt.
        pruning: Pruning | None = prompt.get(KEY, context.rendered) if isinstance(prompt, dict) else context.rendered
        if not pruning:
            _identify(request.mm_features or ())
            return request
        for feature in request.mm_features:
            feature.identifier = pruning.identifiers[feature.mm_hash]
        if transfer := Transfer.of(transfer_params):
            transfer.check(pruning.decisions, len(request.prompt_token_ids))
        if request.sampling_params:
            _add_decisions(request.sampling_params, pruning, input_processor.vllm_config.ec_transfer_config)
        input_processor.renderer.mm_processor.front_end.admit(pruning)
        if pruning.reports and input_processor.vllm_config.observability_config.otlp_traces_endpoint:
            from eadaprune_vllm.frontend.tracing import trace_pruning  # vLLM checks that OpenTelemetry is installed

            request.trace_headers = trace_pruning(request.trace_headers, pruning)
        return request

    @wrap("vllm.entrypoints.generate.beam_search.utils:BeamSearchSequence.get_prompt", optional=_LOST)
    def get_prompt(original: Any, beam: Any) -> Any:
        """Each step of each beam is a new request with the same items. It gets the identifiers, but no reports, which
        would be counted again."""
        prompt = original(beam)
        if KEY in beam.orig_prompt:
            prompt[KEY] = replace(beam.orig_prompt[KEY], reports={}, timings=())
        return prompt


def _add_decisions(sampling_params: Any, pruning: Pruning, ec_transfer_config: Any) -> None:
    """Have them returned to other instances: see ``patches/scheduler.py``."""
    extra = sampling_params.extra_args or {}
    own: dict[str, Any] = {}
    if extra.get(KV_PARAMS):
        own[KV_PARAMS] = {
            modality: [item.model_dump() for item in items] for modality, items in pruning.decisions.items()
        }
    if ec_transfer_config and ec_transfer_config.is_ec_producer:
        own[EC_PARAMS] = {identifier: item.model_dump() for identifier, item in pruning.decided.items()}
    if own:
        sampling_params.extra_args = {**extra, KEY: own}


def _identify(features: Any) -> None:
    """Give items that were rendered before, possibly by another server, identifiers of the tokens kept there."""
    for feature in features:
        name = feature.modality + KEPT
        if feature.data is not None and name in feature.data:
            feature.identifier += digest(feature.data[name].data)
