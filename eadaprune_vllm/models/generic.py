"""Adapters made from vLLM's class alone, by the name of the architecture. They fit models with one embedding per
placeholder and without M-RoPE."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any, ClassVar

import torch
from typing_extensions import override
from vllm.model_executor.models.registry import _MULTIMODAL_MODELS, _resolve_module_name
from vllm.multimodal import MULTIMODAL_REGISTRY

from eadaprune_vllm.core.layout import Layout
from eadaprune_vllm.engine.model import Pruned
from eadaprune_vllm.frontend.processor import PruningProcessor


class EmbedPerPlaceholder(Pruned):
    """Mixin in front of a model that has no adapter of its own.

    The layout is derived from the shape of the pixels: the tiles of an image, or the frames of a video, follow each
    other, have equal numbers of tokens, and these fill a grid with the proportions of the pixels.
    """

    eadaprune_captures_attention: ClassVar[bool] = False
    eadaprune_takes_embeddings: ClassVar[bool] = False

    @override
    @classmethod
    def eadaprune_layout(cls, config: Any, modality: str, data: Mapping[str, Any], num_placeholders: int) -> Layout:
        named = (value for name, value in data.items() if name.startswith("pixel_values"))
        pixels = next((value for value in named if isinstance(value, torch.Tensor)), torch.empty(0))
        tiles = len(pixels) if modality == "video" or pixels.ndim == 4 else 1
        if not tiles or num_placeholders % tiles:
            return Layout.whole(1, num_placeholders)
        length = num_placeholders // tiles
        grid = _grid(length, pixels[0] if pixels.ndim == 4 else pixels)
        # Where several tiles are in the image is not known.
        shown = grid and (tiles == 1 or modality == "video")
        part = torch.arange(tiles).repeat_interleave(length)
        return Layout(part, (grid,) * tiles if grid and shown else ((1, num_placeholders),))


def _grid(length: int, pixels: torch.Tensor) -> tuple[int, int] | None:
    """Height and width of the grid that ``length`` tokens of a picture ``[channels, height, width]`` fill; None if they
    fill none."""
    if pixels.ndim != 3:
        return None
    _, height, width = pixels.shape
    rows = max(round((length * height / width) ** 0.5), 1)
    return (rows, length // rows) if rows**2 * width == length * height else None


def __getattr__(name: str) -> Any:
    """Our class for vLLM's architecture of that name."""
    if name not in _MULTIMODAL_MODELS:
        raise AttributeError(f"vLLM ships no multimodal architecture {name}")
    module, stock_name = _MULTIMODAL_MODELS[name]
    stock = getattr(import_module(_resolve_module_name(module)), stock_name)
    factory = stock._processor_factory
    own = {"__module__": __name__}
    processor = type(f"Pruned{name}Processor", (PruningProcessor, factory.processor), own)
    ocr = {"eadaprune_energy": 1.0} if "OCR" in name.upper() else {}  # pages of text would lose most
    model = type(f"Pruned{name}", (EmbedPerPlaceholder, stock), own | ocr)
    registered = MULTIMODAL_REGISTRY.register_processor(processor, info=factory.info, dummy_inputs=factory.dummy_inputs)
    globals().update({processor.__name__: processor, name: registered(model)})
    return model
