"""The model half of every adapter: vLLM's model without its vision encoder, fed with rows."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from typing_extensions import override
from vllm.model_executor.models.interfaces import SupportsMRoPE, SupportsMultiModal
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal.inputs import PlaceholderRange
from vllm.multimodal.processing import BaseProcessingInfo

from eadaprune_vllm.models.fields import FEATURES, KEPT, ROWS
from eadaprune_vllm.request import MODALITIES


class MaxTokens(BaseProcessingInfo):
    """Mixin for processing infos. States the most tokens of an item outright: an unpruned one's."""

    @override
    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        tokens = {"image": self.get_max_image_tokens()}
        if "video" in self.get_supported_mm_limits():
            tokens["video"] = self.get_max_video_tokens(seq_len, mm_counts)
        return tokens


class Towerless(SupportsMultiModal):
    """Mixin in front of a model.

    Modifications:
    - embeds the rows that the processor ships, past the model's projector if they are before it
    - LoRA finds the language model only
    """

    @override
    def embed_multimodal(self, **kwargs: Any) -> list[torch.Tensor]:
        for modality in MODALITIES:  # vLLM calls with one at a time
            if (rows := kwargs.get(modality + ROWS)) is not None:
                return list(rows)
            if (features := kwargs.get(modality + FEATURES)) is not None:
                # [n, p, D] if all items keep equally many, else n tensors [p_i, D]
                projected = self.multi_modal_projector(torch.cat(tuple(features)))
                return list(projected.split([len(item) for item in features]))
        return []

    def get_mm_mapping(self) -> MultiModelKeys:
        return MultiModelKeys.from_string_field(language_model="language_model")


class UnprunedPositions(SupportsMRoPE):
    """Mixin in front of a model with M-RoPE.

    Modifications:
    - kept tokens have the positions they would have unpruned, and so has the text after them
    """

    @override
    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Any) -> tuple[torch.Tensor, int]:
        """What vLLM says about the unpruned prompt, at the tokens that are left of it."""
        config = self.config
        ids = np.array(input_tokens)
        prompt: list[np.ndarray[Any, Any]] = []  # unpruned, piece by piece
        columns: list[np.ndarray[Any, Any]] = []  # where in it the tokens of the pruned one are
        features = []
        read = length = 0
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            position, modality = feature.mm_position, feature.modality
            text, item = ids[read : position.offset], ids[position.offset : position.offset + position.length]
            read = position.offset + position.length
            token = getattr(config, f"{modality}_token_id")
            grid = feature.data[f"{modality}_grid_thw"].data
            frame = int(grid[1:].prod()) // config.vision_config.spatial_merge_size**2
            kept = feature.data[modality + KEPT].data.numpy()
            where = _where(item == token, item == config.vision_end_token_id, kept, frame)
            unpruned = np.full(int(grid[0]) * frame + (item != token).sum(), token)
            unpruned[where] = item
            prompt += [text, unpruned]
            columns += [length + np.arange(len(text)), length + len(text) + where]
            offset = length + len(text)
            features.append(replace(feature, mm_position=PlaceholderRange(offset, len(unpruned))))
            length = offset + len(unpruned)
        prompt.append(ids[read:])
        columns.append(length + np.arange(len(ids) - read))
        positions, _ = super().get_mrope_input_positions(np.concatenate(prompt).tolist(), features)
        following = int(positions.max()) + 1
        return positions[:, np.concatenate(columns)], following - len(input_tokens)


def _where(embeds: Any, ends: Any, kept: Any, frame: int) -> Any:
    """Where the tokens of a pruned item are in the unpruned one.

    Args:
        embeds: ``[p]`` bool, which of its tokens are not text, of which there may be some between its frames.
        ends: ``[p]`` bool, which of them end a frame.
        kept: which of the unpruned embeds are left.
        frame: unpruned embeds of a frame.
    """
    text_before = (~embeds).cumsum() - ~embeds
    embeds_before = ends.cumsum() * frame
    embeds_before[embeds] = kept
    return text_before + embeds_before


def without(model: Any, *prefixes: str) -> WeightsMapper:
    """The model's mapper of weight names, which also skips what starts with ``prefixes``."""
    skipped = {before + prefix: None for prefix in prefixes for before in ("model.", "")}
    return model.hf_to_vllm_mapper | WeightsMapper(orig_to_new_prefix=skipped)


@contextmanager
def instead(module: Any, **values: Any) -> Iterator[None]:
    """While open, names of a vLLM model's module stand for something else.

    Lets a subclass call the model's own ``__init__`` instead of repeating it.
    """
    originals = {name: getattr(module, name) for name in values}
    vars(module).update(values)
    try:
        yield
    finally:
        vars(module).update(originals)


def nothing(*_: Any, **__: Any) -> None:
    """What is built in the place of a module that the engine does without."""
