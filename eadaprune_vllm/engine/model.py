"""The model half of every adapter: vLLM's model, which takes ready rows beside pixels, and says how it encodes."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from typing_extensions import override
from vllm.model_executor.models.interfaces import SupportsMRoPE, SupportsMultiModal
from vllm.multimodal.inputs import PlaceholderRange

from eadaprune_vllm.core.prune import Layout

# What travels to the engine of a pruned item, each name after its modality.
MM_EMBEDS = "_rows"  # [p, W], the model's dtype, what the language model is fed with
KEPT = "_kept"  # [p] int64, on the CPU, which of the unpruned placeholders these are


def ready_embeds(kwargs: Mapping[str, Any]) -> list[torch.Tensor] | None:
    """The rows of a batch of pruned items; None if it is not one. vLLM batches one modality at a time."""
    return next((list(value) for name, value in kwargs.items() if name.endswith(MM_EMBEDS)), None)


class Pruned(SupportsMultiModal):
    """Mixin in front of a model.

    Modifications:
    - embeds an item that comes as rows by them
    - has the name of vLLM's class, by which drafters of speculative decoding know where its configuration has the
      placeholder

    Attributes:
        eadaprune_modalities: what it takes that can be pruned.
        eadaprune_has_cls: whether its tower has a CLS token.
        eadaprune_takes_embeddings: whether its layout can tell what embeddings of a client mean.
        eadaprune_energy: the default of that option, if it is another for this model.
        eadaprune_observes: whether it can tell which token attention in its tower is given to.
    """

    eadaprune_modalities: ClassVar[tuple[str, ...]] = ("image", "video")
    eadaprune_has_cls: bool = False
    eadaprune_takes_embeddings: ClassVar[bool] = True
    eadaprune_energy: ClassVar[float | None] = None
    eadaprune_observes: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stock = (
            base for base in cls.__mro__ if issubclass(base, torch.nn.Module) and base.__module__.startswith("vllm.")
        )
        cls.__name__ = next((base.__name__ for base in stock), cls.__name__)

    @override
    def embed_multimodal(self, **kwargs: Any) -> Any:
        rows = ready_embeds(kwargs)
        return super().embed_multimodal(**kwargs) if rows is None else rows

    def eadaprune_encode(self, modality: str, **kwargs: Any) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
        """Encode a batch.

        Args:
            modality: of all its items.
            kwargs: what ``embed_multimodal`` takes.

        Returns:
            Of each item the rows ``[placeholders, W]`` that the language model is fed with; and the features
            ``[N, D]`` that budget and selection go by, if these are others.
        """
        return list(self.embed_multimodal(**kwargs)), None

    def eadaprune_features(self, rows: torch.Tensor) -> torch.Tensor:
        """What of the rows of tokens ``[N, W]`` budget and selection go by."""
        return rows

    @classmethod
    def eadaprune_layout(cls, config: Any, modality: str, data: Mapping[str, Any], num_placeholders: int) -> Layout:
        """Where the tokens of an item are; also called without a model.

        Args:
            config: of the model.
            modality: of the item.
            data: as vLLM sends it unpruned.
            num_placeholders: how many it has unpruned.

        Raises:
            ValueError: if embeddings of a client are not of the shape that they say.
        """
        raise NotImplementedError

    def eadaprune_token_scores(self, modality: str, data: Mapping[str, Any], attention: torch.Tensor) -> torch.Tensor:
        """The attention that tokens draw, ``[N]``, of an item.

        Args:
            modality: of the item.
            data: as vLLM sends it unpruned.
            attention: ``[n]`` float32 on the CPU, that its patches draw, in the order of the tower.
        """
        raise NotImplementedError


class UnprunedPositions(SupportsMRoPE):
    """Mixin in front of a model with M-RoPE.

    Modifications:
    - kept tokens have the positions they would have unpruned, and so has the text after them

    Attributes:
        eadaprune_frame_end: what the configuration calls the token that ends a frame of a video that has text between.
    """

    eadaprune_frame_end: ClassVar[str] = "vision_end_token_id"

    def eadaprune_frames(self, modality: str, data: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """The frames of an item, or whatever has text between.

        Args:
            modality: of the item.
            data: as vLLM sends it, what it leaves on the CPU.

        Returns:
            How many embeds each has unpruned, and which tokens end one.
        """
        frames, *sides = data[f"{modality}_grid_thw"].tolist()
        length = math.prod(sides) // self.config.vision_config.spatial_merge_size**2
        end = getattr(self.config, self.eadaprune_frame_end, -1)  # models without videos may have none
        return [length] * frames, [end]

    @override
    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Any) -> tuple[torch.Tensor, int]:
        """What vLLM says about the unpruned prompt, at the tokens that are left of it."""
        if not any(feature.modality + KEPT in feature.data for feature in mm_features):
            stock: tuple[torch.Tensor, int] = super().get_mrope_input_positions(input_tokens, mm_features)
            return stock
        ids = np.array(input_tokens)
        prompt: list[np.ndarray[Any, Any]] = []  # unpruned, piece by piece
        columns: list[np.ndarray[Any, Any]] = []  # where in it the tokens of the pruned one are
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


def of_squares(attention: torch.Tensor, rows: int, columns: int, side: int) -> torch.Tensor:
    """Of the attention that patches draw, line by line, what each token draws: the mean of ``side ** 2`` of them."""
    return attention.view(rows, side, columns, side).mean((1, 3)).flatten()


def _where(embeds: Any, ends: Any, kept: Any, frames: list[int]) -> Any:
    """Where the tokens of a pruned item are in the unpruned one.

    Args:
        embeds: ``[p]`` bool, which of its tokens are not text, of which there may be some between its frames.
        ends: ``[p]`` bool, which of them end a frame.
        kept: which of the unpruned embeds are left.
        frames: unpruned embeds of each frame.
    """
    text_before = (~embeds).cumsum() - ~embeds
    embeds_before = np.cumsum([0, *frames])[ends.cumsum()]
    embeds_before[embeds] = kept
    return text_before + embeds_before
