"""The model's half of every adapter: vLLM's model, which also takes embeddings of pruned items, and how it encodes."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from typing_extensions import override
from vllm.model_executor.models.interfaces import SupportsMRoPE, SupportsMultiModal
from vllm.multimodal.inputs import PlaceholderRange

from eadaprune_vllm.core.layout import Layout

# The fields of a pruned item that are sent to the engine; each name follows that of the modality.
MM_EMBEDS = "_mm_embeds"  # [p, W], the model's dtype, embeddings of the kept placeholders
KEPT = "_kept"  # [p] int64, on the CPU, the indices of these among the unpruned placeholders


def is_pruned(kwargs: Mapping[str, Any]) -> bool:
    """Whether a batch is of pruned items."""
    return any(name.endswith(KEPT) for name in kwargs)


def pruned_embeds(kwargs: Mapping[str, Any]) -> list[torch.Tensor] | None:
    """The embeddings of a batch of pruned items; None for other batches. vLLM batches one modality at a time."""
    return next((list(value) for name, value in kwargs.items() if name.endswith(MM_EMBEDS)), None)


class Pruned(SupportsMultiModal):
    """Mixin in front of a model of vLLM's.

    Modifications:
    - ``embed_multimodal`` returns the embeddings of pruned items as they are, or encodes and prunes them if they come
      without, with the decision of another instance
    - the class has the name of vLLM's class, because drafters of speculative decoding look up the placeholder by it

    Attributes:
        eadaprune_modalities: modalities that can be pruned.
        eadaprune_has_cls: whether the vision tower has a CLS token.
        eadaprune_takes_embeddings: whether ``eadaprune_layout`` supports embeddings that clients computed.
        eadaprune_energy: default of the option ``energy`` for this model, if it differs.
        eadaprune_captures_attention: whether ``eadaprune_token_scores`` is implemented.
    """

    eadaprune_modalities: ClassVar[tuple[str, ...]] = ("image", "video")
    eadaprune_has_cls: bool = False
    eadaprune_takes_embeddings: ClassVar[bool] = True
    eadaprune_energy: ClassVar[float | None] = None
    eadaprune_captures_attention: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stock = (
            base for base in cls.__mro__ if issubclass(base, torch.nn.Module) and base.__module__.startswith("vllm.")
        )
        cls.__name__ = next((base.__name__ for base in stock), cls.__name__)

    @override
    def embed_multimodal(self, **kwargs: Any) -> Any:
        embeds = pruned_embeds(kwargs)
        if embeds is not None:
            return embeds
        name = next((name for name in kwargs if name.endswith(KEPT)), None)
        if name is None:
            return super().embed_multimodal(**kwargs)
        kept = kwargs.pop(name)  # of each item: see ``PendingItem.pruned``
        return [embeds[kept.to(embeds.device)] for embeds in super().embed_multimodal(**kwargs)]

    def eadaprune_encode(self, modality: str, **kwargs: Any) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
        """Encode a batch.

        Args:
            modality: of all its items.
            kwargs: arguments of ``embed_multimodal``.

        Returns:
            Of each item its embeddings ``[placeholders, W]``; and the features ``[N, D]`` for budget and selection, or
            None if ``eadaprune_features`` takes them from the embeddings.
        """
        return list(self.embed_multimodal(**kwargs)), None

    def eadaprune_features(self, embeds: torch.Tensor) -> torch.Tensor:
        """The features for budget and selection, from the embeddings of tokens ``[N, W]``."""
        return embeds

    @classmethod
    def eadaprune_layout(cls, config: Any, modality: str, data: Mapping[str, Any], num_placeholders: int) -> Layout:
        """Where the tokens of an item are. A class method, because the front end has no model.

        Args:
            config: of the model.
            modality: of the item.
            data: of the item, as vLLM sends it without pruning.
            num_placeholders: of the item, without pruning.

        Raises:
            ValueError: if the shape of a client's embeddings does not match their grid.
        """
        raise NotImplementedError

    def eadaprune_token_scores(self, modality: str, data: Mapping[str, Any], attention: torch.Tensor) -> torch.Tensor:
        """The attention that the tokens of an item receive, ``[N]``.

        Args:
            modality: of the item.
            data: of the item, as vLLM sends it without pruning.
            attention: ``[n]`` float32 on the CPU, received by its patches, in the tower's order.
        """
        raise NotImplementedError


class UnprunedPositions(SupportsMRoPE):
    """Mixin in front of a model with M-RoPE.

    Modifications:
    - kept tokens, and the text after them, have the positions that they have without pruning

    Attributes:
        eadaprune_frame_end: the configuration's name of the token that ends a frame, for videos with text between
            frames.
    """

    eadaprune_frame_end: ClassVar[str] = "vision_end_token_id"

    def eadaprune_frames(self, modality: str, data: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """The frames of an item: runs of embeddings with text between them.

        Args:
            modality: of the item.
            data: of the item; only what vLLM leaves on the CPU.

        Returns:
            The number of embeddings of each frame without pruning, and the ids of tokens that end a frame.
        """
        frames, *sides = data[f"{modality}_grid_thw"].tolist()
        length = math.prod(sides) // self.config.vision_config.spatial_merge_size**2
        end = getattr(self.config, self.eadaprune_frame_end, -1)  # models without videos may not have it
        return [length] * frames, [end]

    @override
    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Any) -> tuple[torch.Tensor, int]:
        """vLLM's positions of the unpruned prompt, at the kept tokens."""
        if not any(feature.modality + KEPT in feature.data for feature in mm_features):
            stock: tuple[torch.Tensor, int] = super().get_mrope_input_positions(input_tokens, mm_features)
            return stock
        ids = np.array(input_tokens)
        prompt: list[np.ndarray[Any, Any]] = []  # segments of the unpruned prompt
        columns: list[np.ndarray[Any, Any]] = []  # indices of the pruned prompt's tokens in the unpruned prompt
        features = []
        read = length = 0
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            position, modality = feature.mm_position, feature.modality
            text, item = ids[read : position.offset], ids[position.offset : position.offset + position.length]
            read = position.offset + position.length
            embeds = np.ones_like(item, bool) if position.is_embed is None else position.is_embed.numpy()
            data = feature.data.get_data()
            frames, ends = self.eadaprune_frames(modality, data)
            pruned = modality + KEPT in data
            kept = data[modality + KEPT].numpy() if pruned else np.arange(embeds.sum())
            where = _where(embeds, np.isin(item, ends), kept, frames)
            unpruned = np.full(sum(frames) + (~embeds).sum(), item[embeds][0])
            unpruned[where] = item
            is_embed = torch.ones(len(unpruned), dtype=torch.bool)
            is_embed[where[~embeds]] = False
            prompt += [text, unpruned]
            columns += [length + np.arange(len(text)), length + len(text) + where]
            offset = length + len(text)
            features.append(replace(feature, mm_position=PlaceholderRange(offset, len(unpruned), is_embed)))
            length = offset + len(unpruned)
        prompt.append(ids[read:])
        columns.append(length + np.arange(len(ids) - read))
        positions, _ = super().get_mrope_input_positions(np.concatenate(prompt).tolist(), features)
        following = int(positions.max()) + 1
        return positions[:, np.concatenate(columns)], following - len(input_tokens)


def pool_attention(attention: torch.Tensor, rows: int, columns: int, side: int) -> torch.Tensor:
    """The attention that each token receives: the mean over the ``side ** 2`` patches that are merged into it.

    Args:
        attention: ``[rows * columns * side ** 2]``, of patches line by line.
        rows: of tokens.
        columns: of tokens.
        side: of the merged squares, in patches.
    """
    return attention.view(rows, side, columns, side).mean((1, 3)).flatten()


def _where(embeds: Any, ends: Any, kept: Any, frames: list[int]) -> Any:
    """The indices of a pruned item's tokens in the unpruned item.

    Args:
        embeds: ``[p]`` bool, which of its tokens are embeddings, not text between frames.
        ends: ``[p]`` bool, which of its tokens end a frame.
        kept: indices of its embeddings among the unpruned ones.
        frames: number of unpruned embeddings of each frame.
    """
    text_before = (~embeds).cumsum() - ~embeds
    embeds_before = np.cumsum([0, *frames])[ends.cumsum()]
    embeds_before[embeds] = kept
    return text_before + embeds_before
