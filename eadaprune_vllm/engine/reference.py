"""Before it serves, an engine encodes pictures of many kinds: what any threshold keeps of them."""

from collections.abc import Callable
from typing import Any

from eadaprune_vllm.core.budget import Curve
from eadaprune_vllm.core.options import CHUNK, MODALITIES
from eadaprune_vllm.core.server_options import ServerOptions
from eadaprune_vllm.errors import StartupError
from eadaprune_vllm.messages import DecisionError, DecisionResponse, DecisionResult, pack, unpack_responses
from eadaprune_vllm.reference import pictures, still


def measured(vllm_config: Any, ask: Callable[[bytes], bytes]) -> list[Curve]:
    """The spectra of the reference pictures, as images, or as videos for models that take nothing else.

    Args:
        vllm_config: of an engine.
        ask: its workers packed requests for decisions.

    Raises:
        StartupError: if one cannot be processed, or has another number of rows than of placeholders; or if the features
            of none are finite.
    """
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.processing.inputs import ProcessorInputs

    model_config = vllm_config.model_config
    processor = MULTIMODAL_REGISTRY.create_processor(model_config)
    limits = processor.info.allowed_mm_limits
    if not any(limits.get(modality) for modality in (*MODALITIES, CHUNK)):
        raise StartupError(f"{model_config.architecture} takes neither images nor videos, so there is nothing to prune")
    # A selector whose choice is found at once.
    options = ServerOptions.of(model_config.multimodal_config).defaults.model_copy(update={"selector": "uniform"})
    curves, failed = list[Curve](), DecisionError("there is no reference picture")
    for kind, picture in pictures():
        answer: DecisionResponse
        try:
            (modality,) = items = still(picture, limits)
            inputs = ProcessorInputs([], processor.info.parse_mm_data(items))
            new = processor.read(inputs, modality, 0, options)
            new.request.explain = True
            (answer,) = unpack_responses(ask(pack([new.request])))
        except Exception as error:
            answer = DecisionError(f"{type(error).__name__}: {error}")
        if isinstance(answer, DecisionResult):
            assert answer.explanation, "they were asked for"
            curves.append(Curve(kind, answer.explanation.thresholds.numpy().copy()))
        elif answer.reason == "features":
            failed = answer
        else:
            raise StartupError(f"{model_config.architecture} cannot be pruned: {answer.error}")
    if not curves:
        raise StartupError(f"{model_config.architecture} cannot be pruned: {failed.error}")
    return curves
