"""Before it serves, an engine encodes pictures of many kinds, and tells front ends what any threshold keeps of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import msgspec
import numpy as np

from eadaprune_vllm import startup
from eadaprune_vllm.budget import Curve
from eadaprune_vllm.errors import StartupError
from eadaprune_vllm.models.base import PruningProcessor
from eadaprune_vllm.models.items import still
from eadaprune_vllm.options import CHUNK, KEY, MODALITIES
from eadaprune_vllm.reference import pictures
from eadaprune_vllm.seams.engine import ask_workers
from eadaprune_vllm.seams.wrap import wrap
from eadaprune_vllm.server_options import ServerOptions
from eadaprune_vllm.wire import Answer, Decided, Failed, answers, pack

_READY_CURVES = "_eadaprune_ready_curves"


def install() -> None:
    from vllm.v1.engine import EngineCoreReadyResponse

    @dataclass
    class Ready(EngineCoreReadyResponse):
        """The last thing that an engine says at start, to each front end. vLLM ignores fields that it does not know."""

        eadaprune: list[tuple[str, bytes]] = field(default_factory=list)

    # The step after which workers can encode; the engine's process loads plugins too late to wrap its whole start.
    @wrap("vllm.v1.engine.core:EngineCore._initialize_kv_caches")
    def initialize_kv_caches(original: Any, core: Any, vllm_config: Any) -> Any:
        initialized = original(core, vllm_config)
        curves = measured(vllm_config, partial(ask_workers, core))
        startup.say(startup.inform(vllm_config, curves))
        return initialized

    @wrap("vllm.v1.engine.core:EngineCoreProc._make_ready_response")
    def make_ready_response(original: Any, core: Any) -> Any:
        targets = ServerOptions.of(core.vllm_config.model_config.multimodal_config).targets
        assert targets, "it was informed before"
        told = [(curve.name, curve.needed_above.tobytes()) for curve in targets.curves]
        return Ready(**vars(original(core)), eadaprune=told)

    @wrap("vllm.v1.engine.core_client:MPClient._apply_ready_response")
    def apply_ready_response(original: Any, client: Any, payload: bytes) -> None:
        original(client, payload)
        take_curves(client, msgspec.msgpack.decode(payload))


def take_curves(client: Any, response: Mapping[str, Any]) -> None:
    """Take in what an engine says of the reference pictures.

    Args:
        client: of all engines.
        response: the last that the engine says at start.

    Raises:
        StartupError: if it says nothing of them.
    """
    rank = response["data_parallel_rank"]
    if KEY not in response:
        raise StartupError(
            f"engine {rank} runs without the plugin; every node of a server, headless ones too, needs "
            "--plugin eadaprune and the same --eadaprune-* flags"
        )
    ready_curves = vars(client).setdefault(_READY_CURVES, {})
    ready_curves[rank] = response[KEY]
    # Engines may differ by rounding; all front ends have the same from the first.
    curves = [Curve(name, np.frombuffer(data)) for name, data in ready_curves[min(ready_curves)]]
    startup.inform(client.vllm_config, curves)


def measured(vllm_config: Any, ask: Callable[[bytes], bytes]) -> list[Curve]:
    """The spectra of the reference pictures, as images, or as videos for models that take nothing else.

    Args:
        vllm_config: of an engine.
        ask: its workers packed questions.

    Raises:
        StartupError: if one cannot be processed, or has another number of rows than of placeholders; or if the features
            of none are finite.
    """
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.processing.inputs import ProcessorInputs

    model_config = vllm_config.model_config
    processor = cast(PruningProcessor, MULTIMODAL_REGISTRY.create_processor(model_config))
    limits = processor.info.allowed_mm_limits
    if not any(limits.get(modality) for modality in (*MODALITIES, CHUNK)):
        raise StartupError(f"{model_config.architecture} takes neither images nor videos, so there is nothing to prune")
    # A selector whose choice is found at once.
    options = ServerOptions.of(model_config.multimodal_config).defaults.model_copy(update={"selector": "uniform"})
    curves, failed = list[Curve](), Failed("there is no reference picture")
    for kind, picture in pictures():
        answer: Answer
        try:
            (modality,) = items = still(picture, limits)
            inputs = ProcessorInputs([], processor.info.parse_mm_data(items))
            new = processor.read(inputs, modality, 0, options)
            new.question.explain = True
            (answer,) = answers(ask(pack([new.question])))
        except Exception as error:
            answer = Failed(f"{type(error).__name__}: {error}")
        if isinstance(answer, Decided):
            assert answer.grounds, "they were asked for"
            curves.append(Curve(kind, answer.grounds.needed_above.numpy().copy()))
        elif answer.reason == "features":
            failed = answer
        else:
            raise StartupError(f"{model_config.architecture} cannot be pruned: {answer.error}")
    if not curves:
        raise StartupError(f"{model_config.architecture} cannot be pruned: {failed.error}")
    return curves
