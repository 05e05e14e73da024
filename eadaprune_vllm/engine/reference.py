"""Measures the spectra of the reference pictures. An engine does this once, before it serves."""

from collections.abc import Callable
from typing import Any

from eadaprune_vllm.core.budget import Curve
from eadaprune_vllm.core.options import CHUNK, MODALITIES
from eadaprune_vllm.core.server_options import ServerOptions
from eadaprune_vllm.errors import StartupError
from eadaprune_vllm.messages import DecisionError, DecisionResponse, DecisionResult, pack, unpack_responses
from eadaprune_vllm.reference import as_mm_data, pictures


def measure_curves(vllm_config: Any, call_workers: Callable[[bytes], bytes]) -> list[Curve]:
    """The spectra of the reference pictures, as images, or as videos for models without images.

    Args:
        vllm_config: of the engine.
        call_workers: sends packed decision requests to its workers, and returns packed responses.

    Raises:
        StartupError: if a picture cannot be pruned, or the features of all pictures are NaN or infinite.
    """
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.processing.inputs import ProcessorInputs

    model_config = vllm_config.model_config
    processor = MULTIMODAL_REGISTRY.create_processor(model_config)
    limits = processor.info.allowed_mm_limits
    if not any(limits.get(modality) for modality in (*MODALITIES, CHUNK)):
        raise StartupError(f"{model_config.architecture} takes neither images nor videos, so there is nothing to prune")
    # The selector does not matter here; this one is the fastest.
    options = ServerOptions.of(model_config.multimodal_config).defaults.model_copy(update={"selector": "uniform"})
    curves, failed = list[Curve](), DecisionError("there is no reference picture")
    for kind, picture in pictures():
        response: DecisionResponse
        try:
            (modality,) = mm_data = as_mm_data(picture, limits)
            inputs = ProcessorInputs([], processor.info.parse_mm_data(mm_data))
            new = processor.read(inputs, modality, 0, options)
            new.request.explain = True
            (response,) = unpack_responses(call_workers(pack([new.request])))
        except Exception as error:
            response = DecisionError(f"{type(error).__name__}: {error}")
        if isinstance(response, DecisionResult):
            assert response.explanation, "it was requested"
            curves.append(Curve(kind, response.explanation.thresholds.numpy().copy()))
        elif response.reason == "features":
            failed = response
        else:
            raise StartupError(f"{model_config.architecture} cannot be pruned: {response.error}")
    if not curves:
        raise StartupError(f"{model_config.architecture} cannot be pruned: {failed.error}")
    return curves
