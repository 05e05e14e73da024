"""A model without a server: decisions of an engine in this process."""

import os
from functools import cached_property
from typing import Any

from rich.console import Console
from vllm import LLM
from vllm.exceptions import VLLMServerError
from vllm.multimodal.media import ImageMediaIO

from eadaprune_vllm.core.report import ItemPreview
from eadaprune_vllm.core.server_options import OptionSource, ServerOptions
from eadaprune_vllm.frontend.preview import iter_preview_items
from eadaprune_vllm.frontend.processor import PruningProcessor
from eadaprune_vllm.frontend.request_options import Choices
from eadaprune_vllm.reference import as_mm_data
from eadaprune_vllm.startup.naming import NAME, name_plugins


class OfflineModel:
    """A model that vLLM can serve with this plugin. Its engine starts with the first image.

    Args:
        model: folder or hub id.
        dtype: vLLM's ``--dtype``; ``auto`` is the checkpoint's. Budgets may depend on it.
        revision: of the model on the hub.
    """

    defaults = ServerOptions().resolve()

    def __init__(self, model: str, dtype: str = "auto", revision: str | None = None) -> None:
        self.name = model
        self._model = {"model": model, "revision": revision, "dtype": dtype}
        self.about = self._model | {"budget": ServerOptions().budget}

    def close(self) -> None:
        """Nothing to do: the engine ends with this object."""

    @cached_property
    def _engine(self) -> LLM:
        with Console(stderr=True).status("Starting an engine"):
            name_plugins([NAME])
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # in GiB; nothing is generated
            return LLM(**self._model, enforce_eager=True, max_model_len=-1, max_num_seqs=1)

    def examine(
        self, image: bytes, given: dict[str, Any], *, spectrum: bool = False, overlay: bool = False
    ) -> ItemPreview:
        """Raises:
        StartupError: if the model cannot be served with pruning.
        ValueError: if the image cannot be read, or its features are not finite.
        """
        picture = ImageMediaIO().load_bytes(image).media
        processor: PruningProcessor = self._engine.llm_engine.renderer.mm_processor
        assert processor.front_end
        choice = processor.server_options.choose(OptionSource("options", given))
        mm_data = as_mm_data(picture, processor.info.allowed_mm_limits)
        (item,) = iter_preview_items(processor, mm_data, Choices(image=(choice,), video=(choice,)))
        processor.front_end.decide_sync([item.pending], "preview")
        try:
            return item.preview(overlay, spectrum)
        except VLLMServerError as error:
            raise ValueError(str(error)) from None
