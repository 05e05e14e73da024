"""An engine whose model is one of those of which little is known encodes an image before it serves."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

from eadaprune_vllm.errors import StartupError
from eadaprune_vllm.models import adapter
from eadaprune_vllm.models.base import PruningProcessor
from eadaprune_vllm.models.generic import RowPerPlaceholder
from eadaprune_vllm.options import MODALITIES, PruneOptions
from eadaprune_vllm.seams.engine import ask_workers
from eadaprune_vllm.seams.wrap import wrap
from eadaprune_vllm.wire import Failed, answers, pack


def install() -> None:
    @wrap("vllm.v1.engine.core:EngineCore.__init__")
    def init(original: Any, core: Any, *args: Any, **kwargs: Any) -> None:
        original(core, *args, **kwargs)
        model_config = core.vllm_config.model_config
        if issubclass(adapter(model_config.architecture), RowPerPlaceholder):
            try_out(model_config, partial(ask_workers, core))


def try_out(model_config: Any, ask: Callable[[bytes], bytes]) -> None:
    """Have the largest image, or else video, encoded that vLLM makes up for a model.

    Args:
        model_config: of vLLM's.
        ask: the workers packed questions.

    Raises:
        StartupError: if it cannot be processed, or has another number of rows than of placeholders.
    """
    from vllm.multimodal import MULTIMODAL_REGISTRY

    processor = cast(PruningProcessor, MULTIMODAL_REGISTRY.create_processor(model_config))
    limits = processor.info.allowed_mm_limits
    modality = next((each for each in MODALITIES if limits.get(each)), None)
    if modality is None:
        raise StartupError(f"{model_config.architecture} takes neither images nor videos, so there is nothing to prune")
    try:
        inputs = processor.get_dummy_inputs(model_config.max_model_len, {modality: 1}, {})
        new = processor.read(inputs, modality, 0, PruneOptions())
        (answer,) = answers(ask(pack([new.question])))
        reason = answer.error if isinstance(answer, Failed) else None
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    if reason:
        raise StartupError(f"{model_config.architecture} cannot be pruned: {reason}")
