"""Kept tokens have the M-RoPE positions they have in stock vLLM, and so has the text after them."""

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import FAMILIES
from generic_families import GENERIC
from transformers import AutoConfig
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

from eadaprune_vllm.models import adapter
from eadaprune_vllm.models.base import PruningProcessor

NAMES = [name for name in FAMILIES if name not in GENERIC and not name.startswith("llava")]


class Prompt:
    """A prompt of text, images and videos, unpruned and pruned, as vLLM describes it to a model."""

    def __init__(self, config: Any, name: str) -> None:
        self.config, self.name = config, name
        self.begin, self.end = (
            getattr(config, f"{'image' if name.startswith('glm') else 'vision'}_{which}_token_id")
            for which in ("start", "end")
        )
        self.unpruned: list[int] = []
        self.pruned: list[int] = []
        self.left: list[int] = []  # where in the unpruned prompt the tokens of the pruned one are
        self.features: list[tuple[Any, Any]] = []  # of both

    def _add(self, tokens: list[int], stays: list[bool]) -> None:
        for token, stay in zip(tokens, stays, strict=True):
            if stay:
                self.left.append(len(self.unpruned))
                self.pruned.append(token)
            self.unpruned.append(token)

    def text(self, length: int) -> None:
        self._add([50] * length, [True] * length)

    def item(self, modality: str, grid: list[int], kept: list[int]) -> None:
        """``grid`` in patches; ``kept`` of its tokens."""
        config, (frames, height, width) = self.config, grid
        frame, timestamps = height * width // 4, modality == "video" and self.name.startswith(("qwen3", "glm"))
        is_glm = self.name.startswith("glm")
        token = config.image_token_id if is_glm else getattr(config, f"{modality}_token_id")

        def text(*tokens: int) -> list[tuple[int, bool, bool]]:
            return [(token, True, False) for token in tokens]

        each = text(config.video_start_token_id) if timestamps and is_glm else []  # token, whether it stays, is no text
        for number in range(frames):
            pads = [(token, index in kept, True) for index in range(number * frame, (number + 1) * frame)]
            if timestamps and is_glm:
                each += [*text(self.begin), *pads, *text(self.end, 60, 61 + number)]
            elif timestamps:
                each += [*text(60, 61, 62 + number, self.begin), *pads, *text(self.end)]
            else:
                each += pads
        each += text(config.video_end_token_id) if timestamps and is_glm else []
        tokens, stays, embeds = map(list, zip(*each, strict=True))
        fields = {f"{modality}_grid_thw": torch.tensor(grid), f"{modality}_kept": torch.tensor(kept, dtype=torch.int64)}
        if modality == "video":
            fields["second_per_grid_ts"] = torch.tensor(1.5)
        data: Any = {name: SimpleNamespace(data=value) for name, value in fields.items()}

        def feature(offset: int, is_embed: list[bool]) -> Any:
            mask = None if all(is_embed) else torch.tensor(is_embed)
            position = PlaceholderRange(offset, len(is_embed), mask)
            return MultiModalFeatureSpec(data=data, modality=modality, identifier="x", mm_position=position)

        self._add([self.begin], [True])
        left = [*itertools.compress(embeds, stays)]
        self.features.append((feature(len(self.unpruned), embeds), feature(len(self.pruned), left)))
        self._add(tokens, stays)
        self._add([self.end], [True])

    def positions(self, model_class: type, pruned: bool) -> tuple[torch.Tensor, int]:
        model: Any = object.__new__(model_class)
        torch.nn.Module.__init__(model)
        model.config = self.config
        tokens = self.pruned if pruned else self.unpruned
        found: tuple[torch.Tensor, int] = model.get_mrope_input_positions(
            tokens, [features[pruned] for features in reversed(self.features)]
        )
        return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("share", [1.0, 0.5, 0.1, 0.0])
@pytest.mark.parametrize("order", list(itertools.permutations(["image", "video", "text"])))
def test_positions_are_those_of_stock_vllm(
    family: Callable[[str], Path], name: str, share: float, order: tuple[str, ...]
) -> None:
    """``share`` of the tokens stays; at 0 whole frames are empty, and one token of each item is left."""
    config = AutoConfig.from_pretrained(family(name))
    prompt = Prompt(config, name)
    generator = torch.Generator().manual_seed(0)
    for kind in [*order, "image", "video", "image"]:
        if kind == "text":
            prompt.text(7)
            continue
        grid = [1, 12, 8] if kind == "image" else [4, 6, 8]
        size = grid[0] * grid[1] * grid[2] // 4
        kept = (torch.rand(size, generator=generator) < share).nonzero()[:, 0].tolist() or [size - 1]
        prompt.item(kind, grid, kept)
        prompt.text(3)
    pruned_class = adapter(config.architectures[0])
    stock_class = next(base for base in pruned_class.__mro__ if base.__module__.startswith("vllm."))
    stock, stock_delta = prompt.positions(stock_class, pruned=False)
    ours, delta = prompt.positions(pruned_class, pruned=True)
    assert ours.shape[1] == len(prompt.pruned)
    assert torch.equal(ours, stock[:, prompt.left])
    # What is generated goes on where it would have.
    assert delta + len(prompt.pruned) == stock_delta + len(prompt.unpruned)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("grid", [(1, 12, 8), (1, 8, 40), (4, 6, 8), (9, 4, 4)])
def test_an_item_takes_no_more_positions_than_its_layout_says(
    family: Callable[[str], Path], name: str, grid: tuple[int, int, int]
) -> None:
    """Of an image, exactly so many."""
    config = AutoConfig.from_pretrained(family(name))
    modality = "image" if grid[0] == 1 else "video"
    prompt = Prompt(config, name)
    size = grid[0] * grid[1] * grid[2] // 4
    prompt.item(modality, list(grid), list(range(size)))
    model_class = adapter(config.architectures[0])
    positions, _ = prompt.positions(model_class, pruned=False)
    texts = len(prompt.unpruned) - size  # each takes one
    data = {f"{modality}_grid_thw": torch.tensor(grid), "second_per_grid_ts": torch.tensor(1.5)}
    extent = model_class.eadaprune_layout(config, modality, data, size).extent
    taken = int(positions.max()) + 1 - texts
    assert taken == extent if modality == "image" else taken <= extent


def test_positions_reach_as_far_as_the_models_table() -> None:
    """Four times its length, YaRN's factor included."""

    def refused(skipped: int, **rope: Any) -> bool:
        text = SimpleNamespace(max_position_embeddings=1000, rope_parameters=rope)
        model = SimpleNamespace(hf_text_config=text, uses_mrope=True, max_model_len=1000)
        processor: Any = SimpleNamespace(info=SimpleNamespace(ctx=SimpleNamespace(model_config=model)))
        try:
            PruningProcessor._check_positions(processor, skipped)
        except VLLMValidationError:
            return True
        return False

    assert [refused(skipped, rope_type="default") for skipped in (-5, 3000, 3001)] == [False, False, True]
    yarn = {"rope_type": "yarn", "original_max_position_embeddings": 1000, "factor": 4.0}
    assert [refused(skipped, **yarn) for skipped in (15000, 15001)] == [False, True]
